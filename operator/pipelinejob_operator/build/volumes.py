"""Volumes of every stage pod: the pod's own facts, scratch space, shared memory, the checkpoint claim."""

from typing import Any

from pipelinejob_operator.build.names import CONFIG_ANNOTATION, MEMBERSHIP_ANNOTATION
from pipelinejob_worker.protocol import (
    CHECKPOINT_DIRECTORY,
    CONFIG_FILE,
    MEMBERSHIP_FILE,
    POD_INFO_DIRECTORY,
    RECOVERY_DIRECTORY,
    SCRATCH_DIRECTORY,
)

SHARED_MEMORY_DIRECTORY = "/dev/shm"  # noqa: S108 - a mount point, not a temporary file
SHARED_MEMORY_LIMIT = "1Gi"
"""Most of it that a stage may fill: NCCL and torch take far less. Used pages count as memory."""

INFO, SCRATCH, SHARED_MEMORY, CHECKPOINT, RECOVERY = (
    f"pipelinejob-{part}" for part in ("info", "scratch", "shared-memory", "checkpoint", "recovery")
)
OUR_VOLUMES = frozenset({INFO, SCRATCH, SHARED_MEMORY, CHECKPOINT, RECOVERY})
OUR_MOUNT_PATHS = frozenset({POD_INFO_DIRECTORY, CHECKPOINT_DIRECTORY, RECOVERY_DIRECTORY})
"""Mount paths that a template may not take; those of scratch and shared memory it may."""


def stage_volumes(claim_name: str, *, read_only: bool = False) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Volumes and the worker container's mounts of them; the checkpoint only where a claim is named."""
    volumes: list[dict[str, Any]] = [
        {
            "name": INFO,
            "downwardAPI": {
                "items": [
                    _item(MEMBERSHIP_FILE, MEMBERSHIP_ANNOTATION),
                    _item(CONFIG_FILE, CONFIG_ANNOTATION),
                ]
            },
        },
        {"name": SCRATCH, "emptyDir": {}},
        {"name": SHARED_MEMORY, "emptyDir": {"medium": "Memory", "sizeLimit": SHARED_MEMORY_LIMIT}},
    ]
    mounts: list[dict[str, Any]] = [
        {"name": INFO, "mountPath": POD_INFO_DIRECTORY, "readOnly": True},
        {"name": SCRATCH, "mountPath": SCRATCH_DIRECTORY},
        {"name": SHARED_MEMORY, "mountPath": SHARED_MEMORY_DIRECTORY},
    ]
    if claim_name:
        volumes.append({"name": CHECKPOINT, "persistentVolumeClaim": {"claimName": claim_name}})
        # Only the mount is read-only: another job may be writing to the volume from the same node.
        only = {"readOnly": True} if read_only else {}
        mounts.append({"name": CHECKPOINT, "mountPath": CHECKPOINT_DIRECTORY, **only})
    return volumes, mounts


def recovery_volume(limit_bytes: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The memory in which snapshots and notes outlive the container, and its mount; 0: no limit but the node's.

    What is in it counts as memory of the container.
    """
    memory: dict[str, Any] = {"medium": "Memory"}
    if limit_bytes:
        memory["sizeLimit"] = str(limit_bytes)
    return {"name": RECOVERY, "emptyDir": memory}, {"name": RECOVERY, "mountPath": RECOVERY_DIRECTORY}


def _item(path: str, annotation: str) -> dict[str, Any]:
    return {"path": path, "fieldRef": {"fieldPath": f"metadata.annotations['{annotation}']"}}
