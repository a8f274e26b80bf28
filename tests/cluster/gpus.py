"""GPUs: an extended resource in the nodes' status, as a device plugin would put it there."""

from typing import Any

from tests.cluster.api import JSON_PATCH, Api

RESOURCE = "nvidia.com/gpu"
_POINTER = f"/status/capacity/{RESOURCE.replace('/', '~1')}"


def lacks(node: dict[str, Any], count: int) -> bool:
    """Say whether a node does not offer ``count`` GPUs: new, or its kubelet has set the resource to 0."""
    capacity = node.get("status", {}).get("capacity", {})
    return bool(capacity) and str(capacity.get(RESOURCE)) != str(count)


def offer(api: Api, name: str, count: int) -> None:
    """Write the number of GPUs into a node's capacity; its kubelet copies it to what is allocatable."""
    patch = [{"op": "add", "path": _POINTER, "value": str(count)}]
    api.request("PATCH", f"/api/v1/nodes/{name}/status", patch, JSON_PATCH)
