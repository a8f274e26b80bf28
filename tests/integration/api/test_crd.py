"""The real API server takes the CRD, fills in defaults, and refuses bad input in one line that holds the cure."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelinejob_worker.protocol import Env
from tests.cluster.control_plane import ControlPlane
from tests.integration.api.jobs import GOOD, job, worker
from tests.integration.api.kubectl import Kubectl

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def kubectl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubectl]:
    with ControlPlane(tmp_path_factory.mktemp("plane")) as plane:
        kubectl = Kubectl(plane)
        kubectl.said("apply", "--server-side", "-f", str(ROOT / "crds"))
        kubectl.said("wait", "--for=condition=Established", "crd/pipelinejobs.pipelinejob.dev", "--timeout=30s")
        yield kubectl


NUMBER = r"^[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?$"

REFUSED = {
    "no stages": (
        {"spec__stages": 0},
        "spec.stages: Invalid value: 0: spec.stages in body should be greater than or equal to 1",
    ),
    "too many stages": (
        {"spec__stages": 10_000},
        "spec.stages: Invalid value: 10000: spec.stages in body should be less than or equal to 512",
    ),
    "fewer microbatches than 1F1B needs": (
        {"spec__train__microbatches": 2},
        "spec.train.microbatches: Invalid value: 2 is too few for schedule 1F1B on 4 stages; allowed: 4 or more, or "
        "schedule GPipe",
    ),
    "a batch that does not divide": (
        {"spec__train__globalBatchSize": 30},
        "spec.train.globalBatchSize: Invalid value: 30 is not divisible by microbatches 8; allowed: a multiple of it",
    ),
    "heads that do not divide the width": (
        {"spec__model__preset__heads": 7},
        "spec.model.preset.heads: Invalid value: 7 does not divide width 256; allowed: a divisor of the width",
    ),
    "a dropout that drops all": (
        {"spec__model__preset__dropout": "1"},
        "spec.model.preset.dropout: Invalid value: 1 is not a probability to drop; allowed: 0 or more and less than 1",
    ),
    "an unknown schedule": (
        {"spec__train__schedule": {"name": "Zigzag"}},
        'spec.train.schedule.name: Unsupported value: "Zigzag": supported values: "GPipe", "1F1B"',
    ),
    "an unknown field": (
        {"spec__stagse": 4},
        'Error from server (BadRequest): error when creating "STDIN": PipelineJob in version "v1alpha1" cannot be '
        'handled as a PipelineJob: strict decoding error: unknown field "spec.stagse"',
    ),
    "a reserved environment name": (
        {"spec__template": worker(env=[{"name": "FINE", "value": "1"}, {"name": "MASTER_ADDR", "value": "x"}])},
        "spec.template.spec.containers: Invalid value: environment name MASTER_ADDR is set by the operator; allowed: "
        f"any name but {', '.join(sorted(Env))}",
    ),
    "a model from nowhere": (
        {"spec__model": {}},
        "spec.model.preset: Required value: no source of the model is set; allowed: preset",
    ),
    "a learning rate that is no number": (
        {"spec__train__optimizer": {"learningRate": "fast"}},
        'spec.train.optimizer.learningRate: Invalid value: "fast": spec.train.optimizer.learningRate in body should '
        f"match '{NUMBER}'",
    ),
    "a name too long for pods": (
        {"metadata__name": "a" * 41},
        f"metadata.name: Invalid value: {'a' * 41} cannot name the pods; allowed: at most 40 characters of a-z, 0-9 "
        "and -, a letter first",
    ),
    "a name that pods cannot have": (
        {"metadata__name": "a.b"},
        "metadata.name: Invalid value: a.b cannot name the pods; allowed: at most 40 characters of a-z, 0-9 and -, a "
        "letter first",
    ),
    "an NCCL variable of another kind": (
        {"spec__network": {"nccl": [{"name": "LD_PRELOAD", "value": "x"}]}},
        'spec.network.nccl[0].name: Invalid value: "LD_PRELOAD": spec.network.nccl[0].name in body should match '
        "'^NCCL_[A-Z0-9_]+$'",
    ),
}


@pytest.mark.parametrize(("changes", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_refused_in_one_line(kubectl: Kubectl, changes: dict[str, Any], said: str) -> None:
    assert kubectl.refusal("create", "--dry-run=server", "-f", "-", stdin=job(**changes)) == said


@pytest.mark.parametrize("schedule", ["GPipe", "1F1B"])
def test_good_input_is_taken(kubectl: Kubectl, schedule: str) -> None:
    kubectl.said("create", "--dry-run=server", "-f", "-", stdin=job(spec__train__schedule={"name": schedule}))


def test_gpipe_takes_fewer_microbatches_than_stages(kubectl: Kubectl) -> None:
    few = job(spec__train__schedule={"name": "GPipe"}, spec__train__microbatches=2)
    kubectl.said("create", "--dry-run=server", "-f", "-", stdin=few)


def test_the_template_keeps_what_the_schema_does_not_know(kubectl: Kubectl) -> None:
    template = worker(image="mine", resources={"requests": {"cpu": "2"}}, env=[{"name": "A", "valueFrom": {}}])
    template["spec"]["tolerations"] = [{"operator": "Exists"}]
    made = kubectl.said("create", "--dry-run=server", "-o", "json", "-f", "-", stdin=job(spec__template=template))
    assert json.loads(made)["spec"]["template"] == template


def test_every_example_is_taken(kubectl: Kubectl) -> None:
    assert kubectl.said("apply", "--dry-run=server", "-f", str(ROOT / "examples"), "-n", "default")


@pytest.fixture
def made(kubectl: Kubectl) -> Iterator[None]:
    kubectl.said("create", "-f", "-", stdin=GOOD)
    yield
    kubectl.said("delete", "pj", "tiny")


@pytest.mark.usefixtures("made")
class TestUpdate:
    """Some fields follow the user's wish while the job runs, the others cannot change."""

    def test_stages_scale_within_the_rules(self, kubectl: Kubectl) -> None:
        assert "scaled" in kubectl.said("scale", "pj/tiny", "--replicas=2")
        assert kubectl.refusal("scale", "pj/tiny", "--replicas=9") == (
            "spec.train.microbatches: Invalid value: 8 is too few for schedule 1F1B on 9 stages; allowed: 9 or more, "
            "or schedule GPipe"
        )

    @pytest.mark.parametrize(
        ("patch", "field"),
        [
            ({"train": {"steps": 7}}, "train"),
            ({"model": {"preset": {"width": 512}}}, "model"),
            ({"template": worker(image="other")}, "template"),
            ({"gpu": {"count": 0}}, "gpu"),
            ({"network": {"networkPolicy": "Disabled"}}, "network"),
            ({"placement": {"topologyLevels": ["rack"]}}, "placement"),
        ],
    )
    def test_the_rest_is_immutable(self, kubectl: Kubectl, patch: dict[str, Any], field: str) -> None:
        line = kubectl.refusal("patch", "pj/tiny", "--type=merge", "-p", json.dumps({"spec": patch}))
        assert line == f"spec.{field}: Forbidden: cannot change after creation; delete the job and create it anew"

    @pytest.mark.parametrize(
        "patch",
        [
            {"suspend": True},
            {"checkpoint": {"everySteps": 5}},
            {"recovery": {"maxRestarts": 0}},
            {"activeDeadlineSeconds": 5},
            {"ttlSecondsAfterFinished": 5},
            {"podCleanupPolicy": "All"},
        ],
    )
    def test_wishes_may_change(self, kubectl: Kubectl, patch: dict[str, Any]) -> None:
        assert "patched" in kubectl.said("patch", "pj/tiny", "--type=merge", "-p", json.dumps({"spec": patch}))

    def test_columns(self, kubectl: Kubectl) -> None:
        header, _ = kubectl.said("get", "pj").splitlines()
        assert " ".join(header.split()) == "NAME MODE STAGES STATE STEP PROGRESS LOSS TOKENS/S BUBBLE RESTARTS AGE"


def test_explain_describes_every_field(kubectl: Kubectl) -> None:
    text = kubectl.said("explain", "pj.spec", "--recursive")
    for field in ("stages", "globalBatchSize", "volumeClaimName", "maxRestarts", "topologyLevels"):
        assert field in text
