"""Placement on 500 nodes with a real API server and scheduler: where chains go, and 50 jobs where 20 fit."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from pipelinejob_operator.placement.pods import node_of
from pipelinejob_operator.runtime.client import JOBS
from tests.cluster.control_plane import ControlPlane, free_port
from tests.cluster.controllers import scheduler
from tests.integration.operator.harness import (
    Api,
    Kubelet,
    Manifest,
    Operator,
    eventually,
    job_manifest,
    running,
    state,
)
from tests.integration.operator.test_placing import RACK, Nodes, all_finish

NODES, PER_RACK = 500, 4
FREE_RACKS = 20
STAGES, JOBS_AT_ONCE = 4, 50
CALLS_AT_ONCE = 25


@pytest.fixture(scope="module", autouse=True)
def kube_scheduler(plane: ControlPlane) -> Iterator[None]:
    """The real one, for all pods while it runs."""
    program = scheduler(plane, fast=True, port=free_port())
    program.start()
    yield
    program.stop()


@pytest.fixture
def kubelet(kubelet: Kubelet) -> Kubelet:
    """Runs what the scheduler has bound."""
    kubelet.binds = False
    return kubelet


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


def chain(namespace: str, name: str) -> Manifest:
    """A job of four stages, one GPU each, that fills a rack."""
    pod = {"tolerations": [{"key": "test", "value": namespace}]}
    placement = {"topologyLevels": [RACK]}
    return job_manifest(namespace, name, template={"spec": pod}, placement=placement, stages=STAGES)


def racks(nodes: Nodes, pods: list[Manifest]) -> Counter[int]:
    """How many pods are in each rack."""
    first = len(nodes.name("n"))
    return Counter(int((node_of(pod) or "")[first:]) // PER_RACK for pod in pods)


async def test_a_chain_shares_a_rack_and_keeps_out_of_full_cordoned_and_tainted_nodes_also_when_one_is_lost(
    api: Api, namespace: str, kubelet: Kubelet, nodes: Nodes, operator: Callable[..., Operator]
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
        assert racks(nodes, await api.pods(namespace)) == {FREE_RACKS - 1: STAGES}
        lost = node_of((await api.pods(namespace))[1]) or ""
        await nodes.set(lost.removeprefix(nodes.name("")), "/spec/unschedulable", True)
        await kubelet.end((await api.pods(namespace))[1], 1)
        pods = await eventually(
            lambda: api.pods(namespace),
            lambda pods: len(pods) == STAGES and all(node_of(pod) not in ("", None, lost) for pod in pods),
        )
        assert len(racks(nodes, pods)) == 2, "no rack has four places any more, so one link crosses racks"
        await eventually(lambda: api.job(namespace), state("Running"))


async def test_fifty_jobs_at_once_where_twenty_fit_all_finish(
    api: Api, namespace: str, kubelet: Kubelet, nodes: Nodes, operator: Callable[..., Operator]
) -> None:
    names = [f"job-{number}" for number in range(JOBS_AT_ONCE)]
    with running(operator(everywhere=True)):
        for start in range(0, JOBS_AT_ONCE, CALLS_AT_ONCE):
            await asyncio.gather(*(api.create(JOBS, chain(namespace, n)) for n in names[start : start + CALLS_AT_ONCE]))
        most = await all_finish(api, kubelet, namespace, names, per_node=1)
    assert most > FREE_RACKS * PER_RACK // 2, "many run at once"
