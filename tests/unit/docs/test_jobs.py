"""Every job that the examples and the documentation show can be run as it is shown."""

from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from pipelinejob_operator.api.crd import structural_schema
from pipelinejob_operator.api.v1alpha1 import KIND
from pipelinejob_operator.build.job import Job
from pipelinejob_operator.policy import acceptance
from pipelinejob_operator.policy.facts import Claim
from pipelinejob_worker.models import model_of
from pipelinejob_worker.pipeline.partition import balanced, describe, static_costs
from pipelinejob_worker.pipeline.schedule import bubble_limit
from tests.unit.docs.pages import DOCS, ROOT, Object, pages, yaml_blocks

EXAMPLES = {path.name: list(yaml.safe_load_all(path.read_text())) for path in (ROOT / "examples").glob("*.yaml")}
BLOCKS = [(page, block) for page in pages() for block in yaml_blocks(page)]
JOBS = [
    pytest.param(item, id=f"{where}-{item['metadata']['name']}")
    for where, item in [
        *((name, item) for name, items in sorted(EXAMPLES.items()) for item in items),
        *((page.name, block) for page, block in BLOCKS),
    ]
    if item.get("kind") == KIND
]
FRAGMENTS = [pytest.param(block, id=page.name) for page, block in BLOCKS if "kind" not in block]


def unknown(value: Any, schema: Object, path: str) -> Iterator[str]:
    """Fields that the API server would refuse because the schema does not know them."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from unknown(item, schema["items"], f"{path}[{index}]")
    elif isinstance(value, dict) and "properties" in schema:
        for name, member in value.items():
            if name in schema["properties"]:
                yield from unknown(member, schema["properties"][name], f"{path}.{name}")
            elif not schema.get("x-kubernetes-preserve-unknown-fields"):
                yield f"{path}.{name}"


def as_stored(manifest: Object) -> Object:
    """The manifest with what the API server adds to its metadata."""
    added = {"namespace": "default", "uid": "1", "resourceVersion": "1"}
    return manifest | {"metadata": manifest["metadata"] | added}


def test_there_are_jobs_to_check() -> None:
    assert {"tiny-gpt.yaml", "with-checkpoint.yaml"} <= set(EXAMPLES)
    assert len(JOBS) > len(EXAMPLES)


@pytest.mark.parametrize("manifest", JOBS)
def test_a_job_that_is_shown_is_accepted(manifest: Object) -> None:
    assert list(unknown(manifest["spec"], structural_schema()["properties"]["spec"], "spec")) == []
    job = Job.read(as_stored(manifest))
    name = job.spec.checkpoint.volume_claim_name
    claim = Claim(name, frozenset({"ReadWriteMany"})) if name else None
    case = acceptance.Case(job.spec, job.template, claim, len(job.config().to_json()))
    assert acceptance.check(case) is None


@pytest.mark.parametrize("fragment", FRAGMENTS)
def test_a_part_of_a_job_that_is_shown_is_a_part_of_the_spec(fragment: Object) -> None:
    assert list(unknown(fragment, structural_schema()["properties"]["spec"], "spec")) == []


def test_unknown_fields_are_found() -> None:
    spec = structural_schema()["properties"]["spec"]
    assert list(unknown({"stage": 4, "train": {"step": 1}}, spec, "spec")) == ["spec.stage", "spec.train.step"]


def test_the_claim_of_the_example_can_be_mounted_by_all_stages() -> None:
    claim, job = EXAMPLES["with-checkpoint.yaml"]
    assert claim["kind"] == "PersistentVolumeClaim"
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert job["spec"]["checkpoint"]["volumeClaimName"] == claim["metadata"]["name"]


def test_the_tutorial_says_what_its_job_does() -> None:
    tutorial = DOCS / "tutorials/first-job.md"
    (shown,) = yaml_blocks(tutorial)
    assert [shown] == EXAMPLES["tiny-gpt.yaml"]

    spec = Job.read(as_stored(shown)).spec
    costs = static_costs(model_of(spec.model), spec.train.global_batch_size // spec.train.microbatches)
    chunks = balanced(costs, list(range(spec.stages)), [1.0] * spec.stages).chunks
    layers = [describe(part) for part in chunks]
    text = " ".join(tutorial.read_text().split())
    assert f"layers {', '.join(layers[:-1])} and {layers[-1]}" in text
    assert f"allows {100 * bubble_limit('1F1B', spec.stages, 1, spec.train.microbatches):.0f} % at best" in text
