"""What a pod needs beside room on a node: its bound volumes, and devices that are handed out dynamically."""

import time
from collections.abc import Iterable
from typing import Any

from pipelinejob_operator.runtime.client import CLAIMS, DEVICE_CLASSES, NOT_FOUND, VOLUMES, ApiError, Kubernetes

Manifest = dict[str, Any]

REMEMBERED_SECONDS = 30.0
IMPLICIT = "deviceclass.resource.kubernetes.io/"
"""Prefix of the extended resources that stand for a DeviceClass by its name."""


class Storage:
    """Reads what a pod refers to."""

    def __init__(self, kubernetes: Kubernetes) -> None:
        self._kubernetes = kubernetes
        self._classes: frozenset[str] = frozenset()
        self._read_at = float("-inf")

    async def of(self, pod: Manifest) -> tuple[list[Manifest], bool]:
        """The node affinities of a pod's bound volumes, and whether a claim ties all pods that mount it to one node."""
        affinities: list[Manifest] = []
        one_node = False
        for name in _claims(pod):
            claim = await self._kubernetes.get(CLAIMS, pod["metadata"]["namespace"], name)
            if claim is None:
                continue  # kube-scheduler waits for it
            modes = set(claim["spec"].get("accessModes") or ())
            one_node |= not modes & {"ReadWriteMany", "ReadOnlyMany"} and not _ephemeral(pod, name)
            bound = claim["spec"].get("volumeName")
            volume = await self._kubernetes.get(VOLUMES, "", bound) if bound else None
            required = ((volume or {}).get("spec", {}).get("nodeAffinity") or {}).get("required")
            if required:
                affinities.append(required)
        return affinities, one_node

    async def dynamic(self, resources: Iterable[str]) -> frozenset[str]:
        """Those of ``resources`` that a DeviceClass stands behind: no node's allocatable tells how many are free."""
        extended = frozenset(name for name in resources if "/" in name)
        if not extended:
            return frozenset()
        if time.monotonic() - self._read_at > REMEMBERED_SECONDS:
            self._classes, self._read_at = await self._extended_classes(), time.monotonic()
        return frozenset(name for name in extended if name in self._classes or name.startswith(IMPLICIT))

    async def _extended_classes(self) -> frozenset[str]:
        names: set[str] = set()
        try:
            async for items, _ in self._kubernetes.pages(DEVICE_CLASSES, ""):
                names |= {item["spec"].get("extendedResourceName") or "" for item in items}
        except ApiError as error:
            if error.code != NOT_FOUND:  # the API is not served before 1.34
                raise
        return frozenset(names - {""})


def _claims(pod: Manifest) -> list[str]:
    found = []
    for volume in pod["spec"].get("volumes") or ():
        if claim := volume.get("persistentVolumeClaim"):
            found.append(claim["claimName"])
        elif "ephemeral" in volume:
            found.append(f"{pod['metadata']['name']}-{volume['name']}")
    return found


def _ephemeral(pod: Manifest, claim: str) -> bool:
    return claim.startswith(f"{pod['metadata']['name']}-")
