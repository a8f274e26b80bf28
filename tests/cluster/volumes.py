"""ReadWriteMany volumes: directories of this machine, which all nodes see.

A claim with ``storageClassName: shared`` binds at once to one of a few volumes made beforehand. Directories have
mode 0777, since the kubelet sets no group on host paths. A volume whose claim is deleted is emptied by the agent
and offered again.
"""

import shutil
from pathlib import Path
from typing import Any

from tests.cluster import settings
from tests.cluster.api import JSON_PATCH, Api

CLASS = "shared"
COUNT = 24
SIZE = "10Gi"
ROOT = settings.STATE / "volumes"
PATH = "/api/v1/persistentvolumes"


def _make_directory(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o777)


def create(api: Api) -> None:
    """Make the storage class and its volumes."""
    storage_class = {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": CLASS},
        "provisioner": "kubernetes.io/no-provisioner",
        "volumeBindingMode": "Immediate",
        "reclaimPolicy": "Retain",
    }
    api.apply(f"/apis/storage.k8s.io/v1/storageclasses/{CLASS}", storage_class)
    for index in range(COUNT):
        name = f"{CLASS}-{index}"
        _make_directory(ROOT / name)
        volume = {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": name},
            "spec": {
                "storageClassName": CLASS,
                "capacity": {"storage": SIZE},
                "accessModes": ["ReadWriteMany", "ReadWriteOnce"],
                "persistentVolumeReclaimPolicy": "Retain",
                "hostPath": {"path": str(ROOT / name), "type": "Directory"},
            },
        }
        api.apply(f"{PATH}/{name}", volume)


def released(volume: dict[str, Any]) -> bool:
    """Say whether a volume of ours has lost its claim."""
    ours: bool = volume["spec"].get("storageClassName") == CLASS
    return ours and volume.get("status", {}).get("phase") == "Released"


def recycle(api: Api, volume: dict[str, Any]) -> None:
    """Empty a released volume and offer it again."""
    name, version = volume["metadata"]["name"], volume["metadata"]["resourceVersion"]
    directory = ROOT / name
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    unclaim = [
        {"op": "test", "path": "/metadata/resourceVersion", "value": version},
        {"op": "remove", "path": "/spec/claimRef"},
    ]
    api.request("PATCH", f"{PATH}/{name}", unclaim, JSON_PATCH)
