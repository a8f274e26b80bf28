"""Simulated nodes: kwok answers for their kubelets, so that thousands of pods cost next to nothing.

They carry a taint, so only pods that tolerate ``kwok.x-k8s.io/node`` come to them.
"""

from collections.abc import Collection
from pathlib import Path

from tests.cluster import binaries, gpus, settings
from tests.cluster.api import MERGE_PATCH, Api
from tests.cluster.control_plane import LOOPBACK, ControlPlane, answers
from tests.cluster.processes import Program

MARK = "kwok.x-k8s.io/node"
ROLE_LABELS = {"type": "kwok"}
NODES_PER_RACK = 4
NODES_PER_ZONE = 16


def name_of(index: int) -> str:
    """Return the name of simulated node ``index``, counted from 1."""
    return f"simulated-{index}"


def program(
    plane: ControlPlane,
    *,
    port: int = settings.KWOK_PORT,
    pod_network: str = settings.SIMULATED_POD_NETWORK,
    further: Collection[Path] = (),
) -> Program:
    """Return kwok, which plays the kubelets of the nodes that carry its mark.

    ``further`` are files with more of what it does to pods; its health is served on ``port``.
    """
    address, built = f"{LOOPBACK}:{port}", binaries.ensure_kwok()
    argv: tuple[str | Path, ...] = (
        built / "kwok",
        *(f"--config={file}" for file in (built / "stages.yaml", *further)),
        f"--kubeconfig={plane.kubeconfig}",
        "--manage-all-nodes=false",
        f"--manage-nodes-with-annotation-selector={MARK}=fake",
        "--node-lease-duration-seconds=40",
        f"--cidr={pod_network}",
        f"--server-address={address}",
    )
    return Program(plane.home, "kwok", argv, lambda: answers(f"http://{address}/healthz"))


def manifest(index: int) -> dict[str, object]:
    """Return simulated node ``index``: four a rack, sixteen a zone."""
    name = name_of(index)
    labels = {
        **ROLE_LABELS,
        "kubernetes.io/hostname": name,
        "kubernetes.io/os": "linux",
        "topology.kubernetes.io/region": "region-1",
        "topology.kubernetes.io/zone": f"simulated-zone-{(index - 1) // NODES_PER_ZONE + 1}",
        "topology.pipelinejob.dev/rack": f"simulated-rack-{(index - 1) // NODES_PER_RACK + 1}",
    }
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels, "annotations": {MARK: "fake"}},
        "spec": {"taints": [{"key": MARK, "value": "fake", "effect": "NoSchedule"}]},
    }


def create_nodes(api: Api, count: int, gpu_count: int) -> None:
    """Make simulated nodes with room for many pods each."""
    room = {"cpu": "64", "memory": "512Gi", "pods": "250", gpus.RESOURCE: str(gpu_count)}
    for index in range(1, count + 1):
        path = f"/api/v1/nodes/{name_of(index)}"
        api.apply(path, manifest(index))
        api.request("PATCH", f"{path}/status", {"status": {"capacity": room, "allocatable": room}}, MERGE_PATCH)
