"""The command ``kubectl pipelinejob draw`` as its user sees it, over files; and pictures of jobs that run."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelinejob_operator.api.recovery_status import GroupStatus
from pipelinejob_operator.api.status import Condition, Status
from pipelinejob_operator.build.job import Job
from pipelinejob_operator.build.pods import stage_pod
from pipelinejob_operator.plugin.__main__ import DRAWN, INCOMPLETE, UNUSABLE, main
from pipelinejob_operator.plugin.picture import Cluster, planned, running
from tests.unit.operator.builders import INSTALLATION, job, manifest

RACK = "example.com/rack"
LEVELS = ("topology.kubernetes.io/zone", RACK)

Object = dict[str, Any]


def node(name: str, zone: str, rack: str, gpus: int = 1) -> Object:
    room = {"nvidia.com/gpu": str(gpus), "cpu": "8", "memory": "32Gi", "pods": "110"}
    labels = {LEVELS[0]: zone, RACK: rack}
    return {
        "kind": "Node",
        "metadata": {"name": name, "labels": labels},
        "spec": {},
        "status": {"allocatable": room},
    }


FOUR = [node("a", "z1", "r1"), node("b", "z1", "r1"), node("c", "z1", "r2"), node("d", "z2", "r3")]


def pods(some: Job, *nodes: str) -> list[Object]:
    """The stage pods of a job on these nodes, by rank; an empty name is a pod without a node."""
    found = []
    for place, name in zip(some.shape.places(), nodes, strict=True):
        pod = stage_pod(some, place, INSTALLATION, share_host=False, replacement=0)
        pod["metadata"]["uid"] = f"uid-{place.rank}"
        pod["spec"] |= {"nodeName": name} if name else {}
        found.append(pod)
    return found


@pytest.fixture
def written(tmp_path: Path) -> Any:
    """Write a job and the nodes to files and return the arguments that name them."""

    def write(nodes: list[Object] = FOUR, **spec: Any) -> list[str]:
        given = manifest(**spec)
        file = {"apiVersion": "pipelinejob.dev/v1alpha1", "kind": "PipelineJob", "metadata": {"name": "tiny"}}
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(file | {"spec": given["spec"]}))
        (tmp_path / "nodes.json").write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": nodes}))
        where = ["--cluster", str(tmp_path / "nodes.json"), "--levels", ",".join(LEVELS)]
        return ["draw", "--dry-run", "-f", str(tmp_path / "job.yaml"), *where]

    return write


class TestDryRun:
    def test_it_draws_the_plan_of_a_file_over_the_nodes_of_a_file(
        self, written: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(written()) == DRAWN
        assert capsys.readouterr().out == (
            "topology.kubernetes.io/zone > example.com/rack > kubernetes.io/hostname\n"
            "└─ z1\n"
            "   ├─ r1\n"
            "   │  ├─ a  stages 0\n"
            "   │  └─ b  stages 1\n"
            "   └─ r2\n"
            "      └─ c  stages 2\n"
            "\n"
            "a[0] - b[1] -- c[2]\n"
            "\n"
            "topology.kubernetes.io/zone  weight 100000000  crossed 0\n"
            "example.com/rack             weight 10000  crossed 1\n"
            "kubernetes.io/hostname       weight 1  crossed 1\n"
            "cost 10001\n"
            "3 stages on 3 nodes; links that cross topology.kubernetes.io/zone 0, example.com/rack 1, "
            "kubernetes.io/hostname 1; no plan costs less\n"
        )

    def test_pods_in_the_file_take_room(self, written: Any, capsys: pytest.CaptureFixture[str]) -> None:
        taken = {"requests": {"nvidia.com/gpu": "1"}}
        other = {
            "kind": "Pod",
            "metadata": {"name": "other"},
            "spec": {"nodeName": "b", "containers": [{"name": "x", "resources": taken}]},
        }
        assert main(written([*FOUR, other])) == DRAWN
        assert "crossed 1\nexample.com/rack             weight 10000  crossed 1" in capsys.readouterr().out

    def test_a_job_that_does_not_fit_is_told_what_is_missing(
        self, written: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(written(FOUR[:2])) == INCOMPLETE
        assert capsys.readouterr().out == (
            "No place for 3 stages: 2 of 3 stages fit: nvidia.com/gpu is short by 1; 2 of 2 nodes are eligible\n"
        )

    def test_the_required_level_of_the_job_holds(self, written: Any, capsys: pytest.CaptureFixture[str]) -> None:
        placement = {"topologyLevels": list(LEVELS), "requiredLevel": RACK}
        assert main(written(placement=placement)) == INCOMPLETE
        assert "no example.com/rack takes all, r1 comes closest" in capsys.readouterr().out

    def test_what_the_operator_refuses_is_refused_here(self, written: Any, capsys: pytest.CaptureFixture[str]) -> None:
        train = {"data": {"files": ["/x"]}, "steps": 1, "globalBatchSize": 12, "microbatches": 12}
        assert main(written(stages=12, train=train)) == UNUSABLE
        assert "spec.stages: 12 stages for a model of 8 layers" in capsys.readouterr().err

    def test_a_level_that_no_node_has_is_named(self, written: Any, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(written(placement={"topologyLevels": ["example.com/row"]})) == UNUSABLE
        assert "no node has the label example.com/row; label the nodes" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("kind: [", "allowed: YAML or JSON as kubectl writes it"),
            ("- 1", "has a document that is no object"),
            ("kind: Pod", "has 0 objects of kind PipelineJob; allowed: one"),
            ("kind: PipelineJob\nspec: {stages: 2}", "spec.model: Field required"),
            ("kind: PipelineJob", "spec: Required value; allowed: the spec of a PipelineJob"),
        ],
    )
    def test_a_file_that_cannot_be_used_is_named_with_the_cure(
        self, text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "job.yaml"
        file.write_text(text)
        assert main(["draw", "--dry-run", "-f", str(file), "--cluster", str(file)]) == UNUSABLE
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {file}: ")
        assert words in line

    def test_a_list_of_one_kind_leaves_out_the_kind_of_its_items(
        self, written: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = written()
        bare = [{key: value for key, value in item.items() if key != "kind"} for item in FOUR]
        (tmp_path / "nodes.json").write_text(json.dumps({"kind": "NodeList", "items": bare}))
        assert main(arguments) == DRAWN
        assert "a[0] - b[1] -- c[2]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["draw"], "give the name of a job, or -f with a file"),
        (["draw", "tiny", "-f", "x"], "give the name of a job, or -f with a file"),
        (["draw", "-f", "x"], "-f goes with --dry-run"),
        (["draw", "tiny", "--cluster", "x"], "--cluster goes with -f"),
    ],
)
def test_arguments_that_contradict_each_other(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert words in capsys.readouterr().err


class TestRunning:
    def test_the_stages_are_drawn_where_they_are_beside_what_a_plan_would_cost_now(self) -> None:
        some = job()
        drawn = running(some, Cluster(FOUR, pods(some, "a", "d", "b"), LEVELS))
        assert drawn.complete
        assert "a[0] --- d[1] --- b[2]" in drawn.text
        assert "cost 200000000\n\nA plan made now would cost 10001: 3 stages on 3 nodes" in drawn.text

    def test_a_placement_as_cheap_as_can_be_is_called_so(self) -> None:
        some = job()
        drawn = running(some, Cluster(FOUR, pods(some, "b", "a", "c"), LEVELS))
        assert drawn.text.endswith("cost 10001\n\nA plan made now would cost 10001, no less")

    def test_of_a_job_that_waits_it_says_why_and_draws_the_plan(self) -> None:
        waiting = Condition(
            type="Placed",
            status="False",
            reason="Unschedulable",
            message="0/4 nodes are available",
            last_transition_time="2026-01-01T00:00:00Z",
        )
        some = job(Status(conditions=[waiting]))
        drawn = running(some, Cluster(FOUR, pods(some, "a", "b", ""), LEVELS))
        assert not drawn.complete
        assert drawn.text.startswith(
            "1 of 3 stages have no node, such as stage 2: 0/4 nodes are available\n\nA plan made now:\n"
        )
        assert "a[0] - b[1] -- c[2]" in drawn.text

    def test_pods_of_an_earlier_attempt_are_not_drawn(self) -> None:
        some = job(Status(attempt=1))
        drawn = running(some, Cluster(FOUR, pods(job(), "a", "b", "c"), LEVELS))
        assert drawn.text.startswith("3 of 3 stages have no node\n")

    def test_of_a_replaced_stage_the_newest_pod_is_drawn_and_other_pods_of_the_job_are_not(self) -> None:
        some = job()
        (newer,) = (
            pod for pod in pods(some, "a", "b", "d") if pod["metadata"]["labels"]["pipelinejob.dev/stage"] == "2"
        )
        newer["metadata"]["name"] += "-r1"
        newer["metadata"]["labels"]["pipelinejob.dev/replacement"] = "1"
        front = {"metadata": {"name": "front", "labels": {"pipelinejob.dev/job-uid": some.uid}}, "spec": {}}
        drawn = running(some, Cluster(FOUR, [newer, *pods(some, "a", "b", "c"), front], LEVELS))
        assert "a[0] - b[1] --- d[2]" in drawn.text

    def test_while_the_job_grows_those_stages_are_drawn_that_train(self) -> None:
        ladder = {"strategy": "Ladder"}
        trains = Status(group=GroupStatus(stages=3))
        some, grown = job(recovery=ladder), job(trains, recovery=ladder, stages=4)
        drawn = running(grown, Cluster(FOUR, pods(some, "a", "b", "c"), LEVELS))
        assert drawn.text.endswith("\n\nThese are 3 stages; 4 stages are on their way")

    def test_a_plan_counts_the_pods_of_others_and_not_the_jobs_own(self) -> None:
        some, other = job(), job(meta={"uid": "another", "name": "tiny-2"})
        taken = pods(some, "a", "b", "c") + pods(other, "d", "d", "d")
        assert "a[0] - b[1] -- c[2]" in planned(some, Cluster(FOUR, taken, LEVELS)).text
        assert not planned(other, Cluster(FOUR, taken, LEVELS)).complete

    def test_replicas_that_serve_have_no_links_between_them(self) -> None:
        some = job(stages=1, pipelines=2, mode="Serve", serve={}, train=None)
        drawn = running(some, Cluster(FOUR, pods(some, "a", "d"), LEVELS))
        assert "between pipelines" not in drawn.text
        assert drawn.text.endswith("cost 0\n\nA plan made now would cost 0, no less")
