"""The operator's copy of the jobs and their pods, kept current by watch, re-list and its own writes.

Each object only ever moves forward: an older version never replaces a newer one, and a deleted object never
comes back. So the three sources may arrive in any order. (Resource versions of one kind can be compared as
integers: KEP-5504.)
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from pipelinejob_operator.build.names import (
    JOB_LABEL,
    MANAGED_BY,
    MANAGED_BY_LABEL,
    MEMBERSHIP_ANNOTATION,
    OPENED_ANNOTATION,
)

Manifest = dict[str, Any]
K = TypeVar("K")

KEPT_ANNOTATIONS = (MEMBERSHIP_ANNOTATION, OPENED_ANNOTATION)

REMEMBERED_DELETIONS = 20_000
"""Deleted UIDs that are remembered; a page of a re-list can be that much older than the watch."""


class Key(NamedTuple):
    """A job."""

    namespace: str
    name: str

    def __str__(self) -> str:
        """Render as kubectl users write it."""
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True)
class Drift:
    """What a re-list found that the watch had missed."""

    ghosts: int = 0
    """Objects in the cache that no longer exist."""
    stale: int = 0
    """Objects that the cache lacked, or held in an older version."""


class Cache:
    """Jobs by key, and pods by job. Not thread-safe: one event loop uses it."""

    def __init__(self) -> None:
        self._jobs: dict[Key, Manifest] = {}
        self._pods: dict[Key, dict[str, Manifest]] = {}
        self._deleted: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        """Count the jobs."""
        return len(self._jobs)

    def job(self, key: Key) -> Manifest | None:
        """Return a job's manifest; read only."""
        return self._jobs.get(key)

    def jobs(self) -> Iterator[tuple[Key, Manifest]]:
        """Go through all jobs."""
        return iter(list(self._jobs.items()))

    def pods(self, key: Key) -> list[Manifest]:
        """Return the pods that carry a job's name, trimmed; their owner may be an earlier job."""
        return list(self._pods.get(key, {}).values())

    def put_job(self, manifest: Manifest) -> bool:
        """Take over a job; False where the cache knew as much already."""
        meta = manifest["metadata"]
        return self._put(self._jobs, Key(meta["namespace"], meta["name"]), manifest)

    def put_pod(self, manifest: Manifest) -> bool:
        """Take over a pod; False where the cache knew as much already."""
        return self._put(self._pods.setdefault(pod_key(manifest), {}), manifest["metadata"]["name"], trim(manifest))

    def drop_job(self, key: Key, uid: str) -> bool:
        """Forget a deleted job, unless another one has taken its name."""
        return self._drop(self._jobs, key, uid)

    def drop_pod(self, key: Key, name: str, uid: str) -> bool:
        """Forget a deleted pod, unless another one has taken its name."""
        pods = self._pods.get(key, {})
        gone = self._drop(pods, name, uid)
        if not pods:
            self._pods.pop(key, None)
        return gone

    def replace_jobs(self, listed: Iterable[Manifest], version: int) -> tuple[set[Key], Drift]:
        """Bring the jobs in line with a whole list as of ``version``; return the keys that changed."""
        changed, seen, stale = set(), set(), 0
        for manifest in listed:
            meta = manifest["metadata"]
            key = Key(meta["namespace"], meta["name"])
            seen.add(meta["uid"])
            if self.put_job(manifest):
                changed.add(key)
                stale += 1
        ghosts = [
            (key, held["metadata"]["uid"])
            for key, held in self._jobs.items()
            if held["metadata"]["uid"] not in seen and _version(held) <= version
        ]
        changed |= {key for key, uid in ghosts if self.drop_job(key, uid)}
        return changed, Drift(len(ghosts), stale)

    def replace_pods(self, listed: Iterable[Manifest], version: int, only: Key | None = None) -> tuple[set[Key], Drift]:
        """Bring the pods, of one job or of all, in line with a whole list as of ``version``."""
        changed, seen, stale = set(), set(), 0
        for manifest in listed:
            seen.add(manifest["metadata"]["uid"])
            if self.put_pod(manifest):
                changed.add(pod_key(manifest))
                stale += 1
        ghosts = [
            (key, name, held["metadata"]["uid"])
            for key, pods in self._pods.items()
            if only is None or key == only
            for name, held in pods.items()
            if held["metadata"]["uid"] not in seen and _version(held) <= version
        ]
        changed |= {key for key, name, uid in ghosts if self.drop_pod(key, name, uid)}
        return changed, Drift(len(ghosts), stale)

    def _put(self, held: dict[K, Manifest], key: K, manifest: Manifest) -> bool:
        old = held.get(key)
        if manifest["metadata"]["uid"] in self._deleted or (old and _version(old) >= _version(manifest)):
            return False
        manifest["metadata"].pop("managedFields", None)
        held[key] = manifest
        return True

    def _drop(self, held: dict[K, Manifest], key: K, uid: str) -> bool:
        self._deleted[uid] = None
        if len(self._deleted) > REMEMBERED_DELETIONS:
            self._deleted.popitem(last=False)
        if key not in held or held[key]["metadata"]["uid"] != uid:
            return False
        del held[key]
        return True


def is_ours(manifest: Manifest) -> bool:
    """Whether the operator made this pod."""
    labels = manifest["metadata"].get("labels") or {}
    return labels.get(MANAGED_BY_LABEL) == MANAGED_BY and JOB_LABEL in labels


def pod_key(manifest: Manifest) -> Key:
    """Key of the job whose name a pod carries."""
    meta = manifest["metadata"]
    return Key(meta["namespace"], meta["labels"][JOB_LABEL])


def trim(pod: Manifest) -> Manifest:
    """Keep what plans are made from: a pod's spec and its configuration would be most of the cache."""
    meta, spec, status = pod["metadata"], pod.get("spec", {}), pod.get("status", {})
    kept = (
        "name",
        "namespace",
        "uid",
        "resourceVersion",
        "labels",
        "ownerReferences",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "finalizers",
    )
    annotations = {key: value for key, value in meta.get("annotations", {}).items() if key in KEPT_ANNOTATIONS}
    facts = (
        "phase",
        "reason",
        "message",
        "podIP",
        "nominatedNodeName",
        "conditions",
        "containerStatuses",
        "initContainerStatuses",
    )
    return {
        "metadata": {key: meta[key] for key in kept if key in meta} | {"annotations": annotations},
        "spec": {key: spec[key] for key in ("nodeName", "schedulingGates") if key in spec},
        "status": {key: status[key] for key in facts if key in status},
    }


def _version(manifest: Manifest) -> int:
    return int(manifest["metadata"]["resourceVersion"])
