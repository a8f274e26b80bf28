"""Where stages run on real nodes: near each other in the right order, all or none, and planned anew when refused.

The cluster has nodes with two GPUs each. The stages run a command of their own, because where they run is all that
counts here.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.cluster import faults
from tests.e2e import kit

RACK = "example.com/rack"
POOL = "example.com/pool"
GPU = "nvidia.com/gpu"


@pytest.fixture
def nodes() -> list[str]:
    """Names of the nodes, each with two GPUs that nobody uses any more."""
    kit.wait_for("the pods of the tests before are gone", lambda: not gpu_pods(), 60)
    found = kit.get("nodes")["items"]
    names = sorted(n["metadata"]["name"] for n in found if n["status"]["allocatable"].get(GPU) == "2")
    assert len(names) >= 4
    return names[:4]


def gpu_pods() -> list[str]:
    """All pods that have a GPU, or want one."""
    return [
        pod["metadata"]["name"]
        for pod in kit.get("pods", "-A")["items"]
        if pod["status"].get("phase") in ("Pending", "Running")
        and any(GPU in item.get("resources", {}).get("requests", {}) for item in pod["spec"]["containers"])
    ]


@contextmanager
def labels(key: str, values: dict[str, str]) -> Iterator[None]:
    """Label nodes, and take the labels off again."""
    for name, value in values.items():
        kit.kubectl("label", "node", name, f"{key}={value}", "--overwrite")
    try:
        yield
    finally:
        for name in values:
            kit.kubectl("label", "node", name, f"{key}-")


def job(
    namespace: kit.Namespace, name: str, stages: int, script: str = kit.ON, pod: Any = None, **members: Any
) -> kit.Job:
    """A job whose stages run a shell script."""
    template = kit.template(command=["sh", "-c", script])
    template["spec"] |= {"terminationGracePeriodSeconds": 2, **(pod or {})}
    return kit.Job(namespace, name, kit.spec(stages, 10, template=template, **members))


def hosts(run: kit.Job) -> list[str]:
    """The nodes of a job by stage."""
    return [stage["node"] for stage in run.status["stages"]]


def filler(name: str, **spec: Any) -> kit.Object:
    """A pod of somebody else that takes one GPU."""
    container = {
        "name": "run",
        "image": kit.WORKER_IMAGE,
        "command": ["sh", "-c", kit.ON],
        "resources": {"requests": {GPU: "1"}, "limits": {GPU: "1"}},
    }
    given = {"containers": [container], "terminationGracePeriodSeconds": 1} | spec
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": "filler"}}, "spec": given}


def bound(namespace: kit.Namespace, count: int) -> None:
    """Wait until so many pods of somebody else run."""

    def look() -> bool:
        pods = namespace.list("pods", "app=filler")
        return sum(pod["status"].get("phase") == "Running" for pod in pods) == count

    kit.wait_for(f"{count} other pods run", look, 60, lambda: kit.kubectl("get", "pods", "-n", namespace.name))


def test_the_chain_is_laid_over_the_racks_with_the_fewest_crossings(namespace: kit.Namespace, nodes: list[str]) -> None:
    one, two, three, four = nodes
    with labels(RACK, {one: "a", two: "b", three: "a", four: "b"}):
        namespace.apply(filler("other", nodeName=one))
        bound(namespace, 1)
        # Rack a has three places left and rack b four: only b holds the whole chain.
        run = job(namespace, "chain", 4, placement={"topologyLevels": [RACK]}).create()
        run.wait("Running")
        assert hosts(run) == [two, two, four, four]
        placement = kit.wait_for("the status shows it", lambda: run.status["placement"]["crossings"], 10)
        assert {item["level"]: item["count"] for item in placement} == {RACK: 0, "kubernetes.io/hostname": 1}
        assert [stage["domains"] for stage in run.status["stages"]] == [["b"]] * 4
        wide = kit.kubectl("get", "pj", "chain", "-n", namespace.name, "-o", "wide").splitlines()
        assert "CROSSINGS" in wide[0]
        assert "0/1" in wide[1].split()


def test_two_jobs_that_want_everything_run_one_after_the_other_and_never_hold_half(
    namespace: kit.Namespace, nodes: list[str]
) -> None:
    jobs = [job(namespace, name, 4, "sleep 5", gpu={"count": 2}) for name in ("one", "two")]
    kit.apply(*(made_of(item) for item in jobs))

    def open_pods() -> dict[str, int]:
        """Pods of each job that hold a node, or may get one, all as of one moment."""
        holding = [
            pod["metadata"]["labels"]["pipelinejob.dev/job"]
            for pod in namespace.list("pods", "pipelinejob.dev/job")
            if not pod["spec"].get("schedulingGates") and pod["status"]["phase"] in ("Pending", "Running")
        ]
        return {item.name: holding.count(item.name) for item in jobs}

    seen: list[dict[str, int]] = []

    def both_succeeded() -> bool:
        seen.append(open_pods())
        return all(item.condition("Succeeded").get("status") == "True" for item in jobs)

    kit.wait_for("both have succeeded", both_succeeded, 180, jobs[1].describe)
    assert not [counts for counts in seen if counts["one"] and counts["two"]], seen
    assert {name for counts in seen for name, count in counts.items() if count == 4} == {"one", "two"}
    waited = [item for item in jobs if "NoPlanFits" in item.events()]
    assert len(waited) == 1


def made_of(run: kit.Job) -> kit.Object:
    """The manifest of a job."""
    metadata = {"name": run.name, "namespace": run.namespace.name}
    return {"apiVersion": "pipelinejob.dev/v1alpha1", "kind": "PipelineJob", "metadata": metadata, "spec": run.spec}


def test_a_cordoned_node_is_left_out_and_its_return_wakes_the_job(namespace: kit.Namespace, nodes: list[str]) -> None:
    kit.kubectl("cordon", nodes[1])
    try:
        run = job(namespace, "wide", 4, gpu={"count": 2}).create()
        seen = run.wait("Placed", "False", "NoPlanFits", seconds=30)
        assert "3 of 4 stages fit" in seen["message"]
        assert "1 cordoned" in seen["message"]
        assert all(pod["spec"].get("schedulingGates") for pod in run.pods())
    finally:
        kit.kubectl("uncordon", nodes[1])
    run.wait("Placed", seconds=30)
    assert sorted(hosts(run)) == nodes


def test_what_no_node_could_hold_makes_no_pod_until_a_node_can(namespace: kit.Namespace, nodes: list[str]) -> None:
    run = job(namespace, "impossible", 2, pod={"nodeSelector": {POOL: "none-yet"}}).create()
    seen = run.wait("Placed", "False", "NoPlanFits", seconds=30)
    assert "not selected by nodeSelector" in seen["message"]
    assert "no pod is made before nodes are added or changed" in seen["message"]
    assert run.pods() == []
    with labels(POOL, {nodes[1]: "none-yet"}):
        run.wait("Running", seconds=60)
        assert hosts(run) == [nodes[1]] * 2


def test_a_node_that_the_scheduler_refuses_after_all_is_left_out_of_the_next_plan(
    namespace: kit.Namespace, nodes: list[str]
) -> None:
    """The plan does not look at pod affinity of the template; kube-scheduler does."""
    namespace.apply(filler("other", nodeName=nodes[0], containers=[{**SMALL, "image": kit.WORKER_IMAGE}]))
    bound(namespace, 1)
    away = {"labelSelector": {"matchLabels": {"app": "filler"}}, "topologyKey": "kubernetes.io/hostname"}
    apart = {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [away]}}
    run = job(namespace, "apart", 2, pod={"affinity": apart}).create()
    run.wait("Running", seconds=60)
    assert nodes[0] not in hosts(run)
    assert (run.status["attempt"], run.status["restarts"]) == (1, 0)
    run.wait_events("Replanning")


def test_a_stage_that_its_kubelet_refuses_takes_the_gang_back_and_it_is_planned_anew(
    namespace: kit.Namespace, nodes: list[str]
) -> None:
    first, second = nodes[2:]  # the test before has the operator avoid another one for a while
    with labels(POOL, {first: "in", second: "in"}):
        with faults.silent_kubelet(first):
            run = job(namespace, "moved", 2, pod={"nodeSelector": {POOL: "in"}}).create()
            kit.wait_for(
                "both stages are bound to the node whose kubelet does not see it",
                lambda: [pod["spec"].get("nodeName") for pod in run.pods()] == [first] * 2,
                30,
                run.describe,
            )
            kit.kubectl("label", "node", first, f"{POOL}=out", "--overwrite")
        run.wait("Running", seconds=90)
        assert hosts(run) == [second] * 2
        assert (run.status["attempt"], run.status["restarts"]) == (1, 0)
        run.wait_events("Replanning")


HIGH = {"priorityClassName": "placement-high"}


class TestPreemption:
    @pytest.fixture(autouse=True)
    def classes(self) -> Iterator[None]:
        """A priority for jobs that is above that of all other pods."""
        kind = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass"}
        kit.apply({**kind, "metadata": {"name": "placement-high"}, "value": 1000})
        yield
        kit.kubectl("delete", "priorityclass", "placement-high")

    def test_a_planned_job_waits_and_preempts_nobody(self, namespace: kit.Namespace, nodes: list[str]) -> None:
        namespace.apply(*(filler(f"other-{n}-{name}", nodeName=name) for name in nodes for n in (1, 2)))
        bound(namespace, 8)
        run = job(namespace, "high", 2, pod=HIGH).create()
        run.wait("Placed", "False", "NoPlanFits", seconds=30)
        bound(namespace, 8)
        kit.kubectl("delete", "pod", "-n", namespace.name, f"other-1-{nodes[2]}", f"other-2-{nodes[2]}")
        run.wait("Placed", seconds=30)
        assert hosts(run) == [nodes[2]] * 2
        bound(namespace, 6)

    def test_who_takes_its_room_before_it_is_bound_is_preempted_on_that_node_alone(
        self, namespace: kit.Namespace, nodes: list[str]
    ) -> None:
        """A gate of somebody else holds the pinned pods back from kube-scheduler for a while."""
        hold = {"schedulingGates": [{"name": "example.com/hold"}]}
        run = job(namespace, "high", 2, pod={**HIGH, **hold}).create()
        planned = kit.wait_for("the stages are planned", lambda: all(pins(run)) and pins(run), 30, run.describe)
        assert len(set(planned)) == 1
        taken = [planned[0], next(name for name in nodes if name != planned[0])]
        namespace.apply(*(filler(f"other-{n}-{name}", nodeName=name) for name in taken for n in (1, 2)))
        bound(namespace, 4)
        for pod in run.pods():
            patch = json.dumps([{"op": "remove", "path": "/spec/schedulingGates/0"}])
            kit.kubectl("patch", "pod", pod["metadata"]["name"], "-n", namespace.name, "--type=json", "-p", patch)
        run.wait("Running", seconds=60)
        assert (hosts(run), run.status["attempt"]) == (planned, 0)
        bound(namespace, 2)


def pins(run: kit.Job) -> list[str]:
    """The nodes that a job's pods are pinned to."""
    notes = [pod["metadata"]["annotations"].get("pipelinejob.dev/opened", "{}") for pod in run.pods()]
    return [json.loads(note).get("node", "") for note in notes]


SMALL: kit.Object = {"name": "run", "command": ["sh", "-c", kit.ON], "resources": {"requests": {"cpu": "1m"}}}
