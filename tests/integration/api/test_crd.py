"""The real API server takes the CRD, fills in defaults, and refuses bad input in one line that holds the cure."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.control_plane import ControlPlane
from tests.integration.api import cases, delegated_cases, network_cases, placement_cases
from tests.integration.api.jobs import GOOD, job, worker
from tests.integration.api.kubectl import Kubectl
from tests.integration.api.serving import REFUSED_TO_SERVE, SERVED, served

ROOT = Path(__file__).resolve().parents[3]
REFUSED = cases.REFUSED | network_cases.REFUSED | delegated_cases.REFUSED | placement_cases.REFUSED
TAKEN = cases.TAKEN | network_cases.TAKEN | delegated_cases.TAKEN | placement_cases.TAKEN


@pytest.fixture(scope="module")
def kubectl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubectl]:
    with ControlPlane(tmp_path_factory.mktemp("plane")) as plane:
        kubectl = Kubectl(plane)
        kubectl.said("apply", "--server-side", "-f", str(ROOT / "crds"))
        kubectl.said("wait", "--for=condition=Established", "crd/pipelinejobs.pipelinejob.dev", "--timeout=30s")
        yield kubectl


@pytest.mark.parametrize(("changes", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_refused_in_one_line(kubectl: Kubectl, changes: dict[str, Any], said: str) -> None:
    assert kubectl.refusal("create", "--dry-run=server", "-f", "-", stdin=job(**changes)) == said


@pytest.mark.parametrize(("spec", "said"), REFUSED_TO_SERVE.values(), ids=REFUSED_TO_SERVE.keys())
def test_what_cannot_be_served_is_refused_in_one_line(kubectl: Kubectl, spec: dict[str, Any], said: str) -> None:
    assert kubectl.refusal("create", "--dry-run=server", "-f", "-", stdin=served(**spec)) == said


@pytest.mark.parametrize("spec", SERVED.values(), ids=SERVED.keys())
def test_what_can_be_served_is_taken(kubectl: Kubectl, spec: dict[str, Any]) -> None:
    kubectl.said("create", "--dry-run=server", "-f", "-", stdin=served(**spec))


def test_fronts_can_be_changed_while_they_serve_and_the_engine_cannot(kubectl: Kubectl) -> None:
    kubectl.said("create", "-f", "-", stdin=served())
    try:
        wish = {"spec": {"serve": {"fronts": 3, "limits": {"requestSeconds": 30}}, "pipelines": 2}}
        assert "patched" in kubectl.said("patch", "pj/served", "--type=merge", "-p", json.dumps(wish))
        line = kubectl.refusal("patch", "pj/served", "--type=merge", "-p", '{"spec": {"serve": {"batchTokens": 64}}}')
        assert line == (
            "spec.serve.batchTokens: Forbidden: cannot change after creation; delete the job and create it anew"
        )
    finally:
        kubectl.said("delete", "pj", "served")


@pytest.mark.parametrize("changes", TAKEN.values(), ids=TAKEN.keys())
def test_good_input_is_taken(kubectl: Kubectl, changes: dict[str, Any]) -> None:
    kubectl.said("create", "--dry-run=server", "-f", "-", stdin=job(**changes))


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
            ({"partition": {"strategy": "Even"}}, "partition"),
        ],
    )
    def test_the_rest_is_immutable(self, kubectl: Kubectl, patch: dict[str, Any], field: str) -> None:
        line = kubectl.refusal("patch", "pj/tiny", "--type=merge", "-p", json.dumps({"spec": patch}))
        assert line == f"spec.{field}: Forbidden: cannot change after creation; delete the job and create it anew"

    @pytest.mark.parametrize(
        "patch",
        [
            {"pipelines": 2},
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
        assert " ".join(header.split()) == (
            "NAME MODE STAGES STATE STEP PROGRESS LOSS TOKENS/S BUBBLE REQUESTS/S QUEUE RESTARTS AGE"
        )

    def test_columns_of_the_wide_output(self, kubectl: Kubectl) -> None:
        header, _ = kubectl.said("get", "pj", "-o", "wide").splitlines()
        assert " ".join(header.split()[13:]) == "CHECKPOINT FRONTS SCHEDULE BUBBLE-LIMIT MFU CROSSINGS REASON"

    def test_pipelines_scale_within_the_rules(self, kubectl: Kubectl) -> None:
        line = kubectl.refusal("patch", "pj/tiny", "--type=merge", "-p", json.dumps({"spec": {"pipelines": 4}}))
        assert line == (
            "spec.train.microbatches: Invalid value: 2 a pipeline is too few for schedule 1F1B on 4 stages; allowed: 4 "
            "or more, or schedule GPipe"
        )

    def test_a_status_of_an_operator_that_knew_one_pipeline_stays_valid(self, kubectl: Kubectl) -> None:
        status = {"stages": [{"index": 0, "pod": "tiny-s0-a0"}, {"index": 1, "pod": "tiny-s1-a0"}]}
        patch = json.dumps({"status": status})
        kubectl.said("patch", "pj/tiny", "--subresource=status", "--type=merge", "-p", patch)
        stages = json.loads(kubectl.said("get", "pj/tiny", "-o", "json"))["status"]["stages"]
        assert [(item["index"], item["pipeline"]) for item in stages] == [(0, 0), (1, 0)]

    def test_a_stage_of_each_pipeline_has_an_entry_of_its_own(self, kubectl: Kubectl) -> None:
        places = [{"index": stage, "pipeline": pipeline} for pipeline in range(2) for stage in range(2)]
        patch = json.dumps({"status": {"stages": places}})
        kubectl.said("patch", "pj/tiny", "--subresource=status", "--type=merge", "-p", patch)
        twice = json.dumps({"status": {"stages": [*places, places[0]]}})
        line = kubectl.refusal("patch", "pj/tiny", "--subresource=status", "--type=merge", "-p", twice)
        assert line == 'status.stages[4]: Duplicate value: {"index":0,"pipeline":0}'


def test_explain_describes_every_field(kubectl: Kubectl) -> None:
    text = kubectl.said("explain", "pj.spec", "--recursive")
    for field in ("stages", "globalBatchSize", "volumeClaimName", "maxRestarts", "topologyLevels"):
        assert field in text
