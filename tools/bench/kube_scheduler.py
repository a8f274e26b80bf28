"""Where kube-scheduler would put the stages: the real one, with preferred affinity of neighbours, on made-up nodes.

Starts etcd, an API server and the scheduler in a directory of their own. The nodes are objects that nothing stands
behind, which is all that a scheduler sees of a node. The programs are those of the test bed, built on first use.
"""

import asyncio
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kubernetes.aio import client, config

from pipelinejob_operator.build.delegation import AFFINITY
from pipelinejob_operator.build.installation import Installation
from pipelinejob_operator.build.job import Job
from pipelinejob_operator.build.names import pod_selector
from pipelinejob_operator.build.pods import stage_pod
from pipelinejob_operator.runtime.client import NODES, PODS, Kubernetes, Resource
from tests.cluster.control_plane import Configuration, ControlPlane, free_port
from tests.cluster.controllers import scheduler
from tests.cluster.processes import Program

AT_ONCE = 64
LOOK_SECONDS = 1
PATIENCE_SECONDS = 1200
NAMESPACE, NAME = "default", "bench"

NO_TAINTS = Configuration(arguments=("--disable-admission-plugins=TaintNodesByCondition",))
"""A new node is tainted until a controller finds it ready, and no controller runs here."""

Manifest = dict[str, Any]


def place(
    nodes: Sequence[Manifest], pods: Sequence[Manifest], template: Manifest, shape: tuple[int, int], levels: list[str]
) -> list[str]:
    """The nodes, by rank, that kube-scheduler chooses for the stages and pipelines of ``shape``.

    ``nodes`` and ``pods`` are the cluster, ``template`` is a stage's, ``levels`` the topology's labels, widest first.
    """
    stages = _stage_pods(template, shape, levels)
    with tempfile.TemporaryDirectory() as home, ControlPlane(Path(home), configuration=NO_TAINTS) as plane:
        program = scheduler(plane, fast=True, port=free_port())
        try:
            return asyncio.run(_place(plane, program, nodes, pods, stages))
        finally:
            program.stop()


def _stage_pods(template: Manifest, shape: tuple[int, int], levels: list[str]) -> list[Manifest]:
    """The pods as the operator makes them for a job that is delegated to affinity, with their gates open."""
    stages, pipelines = shape
    job = Job.read(
        {
            "metadata": {"name": NAME, "namespace": NAMESPACE, "uid": "1", "resourceVersion": "1"},
            "spec": {
                "stages": stages,
                "pipelines": pipelines,
                "model": {"preset": {"name": "gpt", "layers": stages, "width": 64, "heads": 4, "context": 32}},
                "train": {"data": {"files": ["/x"]}, "steps": 1, "globalBatchSize": 1, "microbatches": 1},
                "gpu": {"count": 0},
                "placement": {"strategy": "Delegated", "topologyLevels": levels},
                "template": template,
            },
        }
    )
    installation = Installation(worker_image="worker")
    pods = [stage_pod(job, place, installation, share_host=False, delegate=AFFINITY) for place in job.shape.places()]
    for pod in pods:
        del pod["spec"]["schedulingGates"]
        del pod["metadata"]["ownerReferences"]
        for container in pod["spec"]["containers"]:  # nodes made of nothing declare no kubelet that knows the rules
            container.pop("restartPolicy", None)
            container.pop("restartPolicyRules", None)
    return pods


async def _place(
    plane: ControlPlane,
    program: Program,
    nodes: Sequence[Manifest],
    pods: Sequence[Manifest],
    stages: Sequence[Manifest],
) -> list[str]:
    settings = client.Configuration()
    await config.load_kube_config(config_file=str(plane.kubeconfig), client_configuration=settings)  # type: ignore[no-untyped-call]
    kubernetes = Kubernetes(client.ApiClient(settings), lambda: None)
    try:
        await _create(kubernetes, NODES, nodes)
        await _create(kubernetes, PODS, pods)
        # The stages wait for the scheduler, which so sees the whole cluster and all of them, as behind their gates.
        await _create(kubernetes, PODS, stages)
        program.start()
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await _bound(kubernetes, [pod["metadata"]["name"] for pod in stages])
    finally:
        await kubernetes.close()


async def _create(kubernetes: Kubernetes, resource: Resource, manifests: Sequence[Manifest]) -> None:
    for start in range(0, len(manifests), AT_ONCE):
        await asyncio.gather(*(kubernetes.create(resource, item) for item in manifests[start : start + AT_ONCE]))


async def _bound(kubernetes: Kubernetes, names: Sequence[str]) -> list[str]:
    """The nodes of the pods ``names``, once all have one."""
    while True:
        found: Mapping[str, str] = {
            pod["metadata"]["name"]: pod["spec"]["nodeName"]
            async for page, _ in kubernetes.pages(PODS, NAMESPACE, pod_selector(NAME))
            for pod in page
            if pod["spec"].get("nodeName")
        }
        if len(found) == len(names):
            return [found[name] for name in names]
        await asyncio.sleep(LOOK_SECONDS)
