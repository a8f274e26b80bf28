"""Placement on 500 nodes, with the real kube-scheduler: where chains go, and 50 jobs where 20 fit.

kwok plays the kubelets: a stage runs when it is bound, and has trained when it has got its membership.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

import pytest

from pipelinejob_operator.build.names import JOB_LABEL, MEMBERSHIP_ANNOTATION
from pipelinejob_operator.runtime.client import JOBS, PODS
from tests.cluster import kwok
from tests.cluster.control_plane import Configuration, ControlPlane, free_port
from tests.cluster.controllers import scheduler
from tests.integration.operator.conftest import install
from tests.integration.operator.harness import Api, Manifest, Operator, eventually, job_manifest, running, state
from tests.integration.operator.nodes import RACK, Nodes

NODES, PER_RACK = 500, 4
FREE_RACKS = 20
STAGES, JOBS_AT_ONCE = 4, 50
RACKS_OF_LARGE = 4
CALLS_AT_ONCE = 25

NO_TAINTS = Configuration(arguments=("--disable-admission-plugins=TaintNodesByCondition",))
"""A new node is tainted until a controller finds it ready, and no controller runs here."""

POD_NETWORK = "127.1.0.0/16"
"""Nothing answers there, and at once."""

TRAINS_SHORTLY = "example.com/trains-shortly"


def trained() -> Manifest:
    """What kwok does to a stage that trains shortly, three seconds after it has got its membership."""
    ended = '{exitCode: 0, reason: Completed, finishedAt: "{{ Now }}"}'
    status = f"""
phase: Succeeded
containerStatuses:
{{{{ range .spec.containers }}}}
- {{name: "{{{{ .name }}}}", image: "{{{{ .image }}}}", ready: false, restartCount: 0, state: {{terminated: {ended}}}}}
{{{{ end }}}}
"""
    when = [
        {"key": ".metadata.deletionTimestamp", "operator": "DoesNotExist"},
        {"key": ".status.phase", "operator": "In", "values": ["Running"]},
        {"key": f'.metadata.annotations["{MEMBERSHIP_ANNOTATION}"]', "operator": "Exists"},
    ]
    return {
        "apiVersion": "kwok.x-k8s.io/v1alpha1",
        "kind": "Stage",
        "metadata": {"name": "stage-trained"},
        "spec": {
            "resourceRef": {"apiGroup": "v1", "kind": "Pod"},
            "selector": {"matchLabels": {TRAINS_SHORTLY: "true"}, "matchExpressions": when},
            "delay": {"durationMilliseconds": 3000},
            "next": {"statusTemplate": status},
        },
    }


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane with the real scheduler, and kwok."""
    stage = tmp_path_factory.mktemp("kwok") / "trained.json"
    stage.write_text(json.dumps(trained()))
    with ControlPlane(tmp_path_factory.mktemp("scale"), configuration=NO_TAINTS) as made:
        asyncio.run(install(made))
        programs = (
            scheduler(made, fast=True, port=free_port()),
            kwok.program(made, port=free_port(), pod_network=POD_NETWORK, further=[stage]),
        )
        try:
            for program in programs:
                program.start()
            yield made
        finally:
            for program in programs:
                program.stop()


@pytest.fixture
async def nodes(api: Api, namespace: str) -> AsyncIterator[Nodes]:
    """500 nodes, four a rack. Those of the first 20 racks have a GPU each, those of all others are full."""
    made = Nodes(api, namespace)
    free = FREE_RACKS * PER_RACK
    try:
        for start in range(0, NODES, CALLS_AT_ONCE):
            await asyncio.gather(
                *(
                    made.add(f"n{number}", int(number < free), f"r{number // PER_RACK}")
                    for number in range(start, min(start + CALLS_AT_ONCE, NODES))
                )
            )
        yield made
    finally:
        await made.clear()


def chain(namespace: str, name: str, stages: int = STAGES, *, trains: bool = False, level: str = "") -> Manifest:
    """A job of stages with one GPU each; four fill a rack."""
    template = {
        "metadata": {"labels": {TRAINS_SHORTLY: "true"} if trains else {}},
        "spec": {"tolerations": [{"key": "test", "value": namespace}]},
    }
    placement = {"topologyLevels": [RACK], "requiredLevel": level}
    manifest = job_manifest(namespace, name, template=template, placement=placement, stages=stages)
    manifest["spec"]["model"]["preset"]["layers"] = 2 * stages
    manifest["spec"]["train"] |= {"globalBatchSize": stages, "microbatches": stages}
    return manifest


def racks(nodes: Nodes, pods: Sequence[Manifest]) -> list[int]:
    """The racks of pods that kube-scheduler has bound, in the order of their stages."""
    first = len(nodes.name("n"))
    return [int(pod["spec"]["nodeName"][first:]) // PER_RACK for pod in pods]


def all_on_nodes(pods: Sequence[Manifest], count: int = STAGES) -> bool:
    return len(pods) == count and all(pod["spec"].get("nodeName") for pod in pods)


async def test_a_chain_shares_a_rack_and_keeps_out_of_full_cordoned_and_tainted_nodes_also_when_one_is_lost(
    api: Api, namespace: str, nodes: Nodes, operator: Callable[..., Operator]
) -> None:
    taint = [{"key": "example.com/repair", "effect": "NoSchedule"}]
    for rack in range(FREE_RACKS - 1):  # of each rack but the last one a node is not to be had
        member = f"n{rack * PER_RACK + rack % PER_RACK}"
        if rack % 2:
            await nodes.set(member, "/spec/unschedulable", True)
        else:
            await nodes.set(member, "/spec/taints", taint)
    with running(operator(everywhere=True)):
        await api.create(JOBS, chain(namespace, "tiny"))
        await eventually(lambda: api.job(namespace), state("Running"))
        before = await api.pods(namespace)
        assert racks(nodes, before) == [FREE_RACKS - 1] * STAGES
        lost = before[1]["spec"]["nodeName"]
        await nodes.set(lost.removeprefix(nodes.name("")), "/spec/unschedulable", True)
        await api.delete(PODS, namespace, before[1]["metadata"]["name"], before[1]["metadata"]["uid"])
        after = await eventually(
            lambda: api.pods(namespace),
            lambda pods: all_on_nodes(pods) and lost not in {pod["spec"]["nodeName"] for pod in pods},
        )
        crossings = sum(one != other for one, other in zip(racks(nodes, after), racks(nodes, after)[1:], strict=False))
        assert crossings == 1, "no rack has four places any more, so one link crosses racks"
        await eventually(lambda: api.job(namespace), state("Running"))


async def test_fifty_jobs_at_once_where_twenty_fit_all_finish(
    api: Api, namespace: str, nodes: Nodes, operator: Callable[..., Operator]
) -> None:
    """One in the middle wants four racks, all others one each: it ends before the last of those that came after it."""
    earlier = [f"earlier-{number}" for number in range(JOBS_AT_ONCE // 2)]
    later = [f"later-{number}" for number in range(JOBS_AT_ONCE - len(earlier) - 1)]
    with running(operator(everywhere=True)):
        await asyncio.gather(*(api.create(JOBS, chain(namespace, name, trains=True, level=RACK)) for name in earlier))
        await api.create(JOBS, chain(namespace, "large", RACKS_OF_LARGE * STAGES, trains=True))
        await asyncio.gather(*(api.create(JOBS, chain(namespace, name, trains=True, level=RACK)) for name in later))
        ended, most = await all_succeed(api, namespace, {*earlier, "large", *later})
    assert ended.index("large") < len(ended) - 1, "a job that wants much is not starved by small ones"
    assert RACKS_OF_LARGE * STAGES < most <= FREE_RACKS * PER_RACK, "several run at once, on what there is"
    used = {name: len(set(racks(nodes, await api.pods(namespace, name)))) for name in (*earlier, *later)}
    assert used == dict.fromkeys(used, 1), "the rack that they require"


async def all_succeed(api: Api, namespace: str, names: set[str]) -> tuple[list[str], int]:
    """The jobs in the order in which they succeed, and the most stages that had a node at once.

    At no time two jobs have a part of what they want each.
    """
    ended, busiest = list[str](), 0

    async def look() -> list[str]:
        nonlocal busiest
        pods = [pod for pod in await api.items(PODS, namespace) if pod["status"]["phase"] in ("Pending", "Running")]
        parts = {True: set[str](), False: set[str]()}
        for pod in pods:
            parts["schedulingGates" in pod["spec"]].add(pod["metadata"]["labels"][JOB_LABEL])
        assert len(parts[True] & parts[False]) <= 1, "one gang at a time is let go"
        busiest = max(busiest, sum("nodeName" in pod["spec"] for pod in pods))
        done = [job["metadata"]["name"] for job in await api.items(JOBS, namespace) if state("Succeeded")(job)]
        ended.extend(name for name in done if name not in ended)
        return ended

    await eventually(look, lambda ended: set(ended) == names, seconds=180)
    return ended, busiest


async def test_a_spare_stands_in_the_rack_of_the_stages_on_a_node_of_its_own(
    api: Api, namespace: str, operator: Callable[..., Operator]
) -> None:
    few = Nodes(api, namespace)
    try:
        for number in range(5 * PER_RACK):
            await few.add(f"n{number}", 1, f"r{number // PER_RACK}")
        with running(operator(everywhere=True)):
            manifest = chain(namespace, "tiny", PER_RACK - 1)
            manifest["spec"]["recovery"] = {"strategy": "Ladder", "spares": 1}
            await api.create(JOBS, manifest)
            pods = await eventually(lambda: api.pods(namespace), lambda pods: all_on_nodes(pods, PER_RACK))
            assert len(set(racks(few, pods))) == 1, "stages and spare"
    finally:
        await few.clear()
