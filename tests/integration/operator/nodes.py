"""Nodes with GPUs for the tests of placement, jobs that want them, and what is asked of their pods."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from pipelinejob_operator.placement.pods import node_of
from pipelinejob_operator.runtime.client import JOBS, NODES, PODS
from tests.cluster import kwok
from tests.integration.operator.harness import (
    Api,
    Kubelet,
    Manifest,
    conditions,
    eventually,
    job_manifest,
    state,
)

RACK = "example.com/rack"
GPU = "nvidia.com/gpu"
FEATURES = ["RestartAllContainersOnContainerExits"]
"""What kube-scheduler wants a kubelet to declare before a stage pod may go to it."""


class Nodes:
    """Nodes for the jobs of one test; a taint keeps those of other tests away. Where kwok runs, it is their kubelet."""

    def __init__(self, api: Api, namespace: str) -> None:
        self._api, self._namespace = api, namespace
        self._made: list[str] = []

    def name(self, short: str) -> str:
        return f"{self._namespace}-{short}"

    async def add(self, short: str, gpus: int, rack: str = "", cpu: str = "8") -> None:
        labels = {"kubernetes.io/hostname": self.name(short)} | ({RACK: rack} if rack else {})
        meta = {"name": self.name(short), "labels": labels, "annotations": {kwok.MARK: "fake"}}
        await self._api.post("/api/v1/nodes", {"metadata": meta})
        self._made.append(self.name(short))
        room = {"cpu": cpu, "memory": "16Gi", "pods": "110", GPU: str(gpus)}
        ready = [{"type": "Ready", "status": "True"}]
        status = {"capacity": room, "allocatable": room, "conditions": ready, "declaredFeatures": FEATURES}
        await self._api.json_patch(
            NODES, "", self.name(short), [{"op": "add", "path": "/status", "value": status}], "status"
        )
        # The API server starts a node with a taint that the node controller takes away.
        await self.set(short, "/spec/taints", [{"key": "test", "value": self._namespace, "effect": "NoSchedule"}])

    async def set(self, short: str, path: str, value: Any) -> None:
        await self._api.json_patch(NODES, "", self.name(short), [{"op": "add", "path": path, "value": value}])

    async def clear(self) -> None:
        for name in self._made:
            found = await self._api.get(NODES, "", name)
            if found:
                await self._api.delete(NODES, "", name, found["metadata"]["uid"])


def wants(namespace: str, name: str = "tiny", template: Manifest | None = None, **spec: Any) -> Manifest:
    """A job of three stages, one GPU each, that tolerates the test's nodes."""
    pod = {"tolerations": [{"key": "test", "value": namespace}], **(template or {})}
    given = {"placement": {"topologyLevels": [RACK]}} | spec
    return job_manifest(namespace, name, template={"spec": pod}, **given)


def short(namespace: str, name: str) -> str:
    return name.removeprefix(f"{namespace}-")


def pinned(namespace: str, pods: list[Manifest]) -> list[str]:
    """The nodes that open pods are pinned to, by stage."""
    return [
        short(namespace, node_of({"spec": {**pod["spec"], "nodeName": ""}}) or "nowhere")
        for pod in pods
        if not pod["spec"].get("schedulingGates")
    ]


def says(kind: str, status: str, reason: str) -> Callable[[Manifest], bool]:
    return lambda job: conditions(job).get(kind) == (status, reason)


async def finish(api: Api, kubelet: Kubelet, namespace: str, job: str = "tiny") -> None:
    for pod in await api.pods(namespace, job):
        await kubelet.end(pod, 0)


async def all_finish(api: Api, kubelet: Kubelet, namespace: str, names: list[str], *, per_node: int) -> int:
    """End the stages of whatever jobs run until all have finished; return the most stages at once.

    At no time a node holds more than it has.
    """
    left, busiest = set(names), 0

    async def round_of_all() -> set[str]:
        nonlocal busiest
        pods = [pod for pod in await api.items(PODS, namespace) if pod["status"]["phase"] in ("Pending", "Running")]
        opened = [pod for pod in pods if "schedulingGates" not in pod["spec"]]
        taken = Counter(node_of(pod) for pod in opened)
        assert max(taken.values(), default=0) <= per_node, "no node holds more than it has"
        busiest = max(busiest, len(opened))
        for job in await api.items(JOBS, namespace):
            name = job["metadata"]["name"]
            if state("Succeeded")(job):
                left.discard(name)
            elif state("Running")(job):
                await finish(api, kubelet, namespace, name)
        return left

    await eventually(round_of_all, lambda names: not names, seconds=180)
    return busiest
