"""The hands: turn actions into calls of the API server. Each may be repeated safely."""

import asyncio
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import structlog

from pipelinejob_operator.api.status import Status
from pipelinejob_operator.api.v1alpha1 import GROUP, KIND
from pipelinejob_operator.build.job import Job
from pipelinejob_operator.build.names import FIELD_MANAGER, GATE, MEMBERSHIP_ANNOTATION
from pipelinejob_operator.build.pods import without_restart_in_place
from pipelinejob_operator.controller.actions import (
    Action,
    ApplyObject,
    AskRoom,
    CreatePod,
    DeleteJob,
    DeletePod,
    NoteRelease,
    OpenGate,
    PlaceGang,
    ReleasePod,
    SetMembership,
)
from pipelinejob_operator.controller.observed import Unplaced
from pipelinejob_operator.controller.placer import Placer
from pipelinejob_operator.controller.refusals import Refused, classify
from pipelinejob_operator.policy.facts import Manifest, Pod
from pipelinejob_operator.policy.reasons import Reason
from pipelinejob_operator.runtime import metrics
from pipelinejob_operator.runtime.cache import Cache, Key
from pipelinejob_operator.runtime.client import (
    CONFLICT,
    FORBIDDEN,
    JOBS,
    PODS,
    UNPROCESSABLE,
    ApiError,
    Kubernetes,
    Resource,
)

AT_ONCE = 16
PLURALS = {
    "ConfigMap": "configmaps",
    "Deployment": "deployments",
    "NetworkPolicy": "networkpolicies",
    "PodDisruptionBudget": "poddisruptionbudgets",
    "PodGroup": "podgroups",
    "Service": "services",
}
RULES_FIELD = "restartPolicyRules"
"""What an API server names that refuses containers' restart rules."""
HASH_ANNOTATION = f"{GROUP}/manifest-hash"

log = structlog.get_logger(__name__)


class Executor:
    """Carries out actions. What a write returns goes into the cache at once, so the next look sees it."""

    def __init__(self, kubernetes: Kubernetes, cache: Cache, placer: Placer | None) -> None:
        self._kubernetes, self._cache, self._placer = kubernetes, cache, placer

    async def execute(self, job: Job, actions: Sequence[Action]) -> Refused | Unplaced | None:
        """Carry out the actions in order, several at once where their order does not matter.

        Stops at the first refusal, or where there are no nodes, and returns that.
        Raises ``ApiError`` where the world is no longer what the plan saw (409, or 422 of a test), or the server
        fails: the caller plans anew.
        """
        for start in range(0, len(actions), AT_ONCE):
            part = actions[start : start + AT_ONCE]
            results = await asyncio.gather(*(self._one(job, action) for action in part), return_exceptions=True)
            for result in results:
                if isinstance(result, BaseException):
                    raise result
            if no := next((result for result in results if isinstance(result, Refused | Unplaced)), None):
                return no
        return None

    async def write_status(self, job: Job, status: Status) -> None:
        """Replace the status; 422 where the job is no longer the version that it was made from.

        It is read again then: should the watch be behind, every later status would be refused as well.
        """
        operations: list[dict[str, Any]] = [
            {"op": "test", "path": "/metadata/resourceVersion", "value": job.resource_version},
            {"op": "add", "path": "/status", "value": render(status)},
        ]
        try:
            written = await self._kubernetes.json_patch(JOBS, job.namespace, job.name, operations, "status")
        except ApiError as error:
            if error.code in (CONFLICT, UNPROCESSABLE) and (
                newer := await self._kubernetes.get(JOBS, job.namespace, job.name)
            ):
                self._cache.put_job(newer)
            raise
        metrics.WRITES.labels("status").inc()
        self._cache.put_job(written)

    async def _one(self, job: Job, action: Action) -> Refused | Unplaced | None:
        match action:
            case ApplyObject(manifest):
                return await self._apply(job, manifest)
            case CreatePod(manifest):
                return await self._create_pod(job, manifest)
            case OpenGate(pod):
                path = f"/spec/schedulingGates/{pod.gate}"
                await self._patch_pod(
                    job,
                    pod,
                    [{"op": "test", "path": f"{path}/name", "value": GATE}, {"op": "remove", "path": path}],
                )
            case AskRoom(manifests) if self._placer:
                return await self._placer.foresee(job, manifests)
            case PlaceGang() if self._placer:
                return await self._placer.place(job)
            case NoteRelease(node) if self._placer:
                self._placer.note_release(job, node)
            case SetMembership(pod, value, labels):
                path = _pointer("annotations", MEMBERSHIP_ANNOTATION)
                await self._patch_pod(
                    job,
                    pod,
                    [
                        {"op": "test", "path": path, "value": pod.membership},
                        {"op": "replace", "path": path, "value": value},
                        *(_label(name, wanted) for name, wanted in labels.items()),
                    ],
                )
            case DeletePod(pod):
                await self._delete_pod(job, pod)
            case ReleasePod(pod, finalizer):
                path = f"/metadata/finalizers/{pod.finalizers.index(finalizer)}"
                await self._patch_pod(
                    job,
                    pod,
                    [{"op": "test", "path": path, "value": finalizer}, {"op": "remove", "path": path}],
                )
            case DeleteJob():
                log.info("deleting the finished job, its time to live is over")
                await self._kubernetes.delete(JOBS, job.namespace, job.name, job.uid)
                metrics.WRITES.labels("delete job").inc()
        return None

    async def _create_pod(self, job: Job, manifest: Manifest) -> Refused | None:
        name = manifest["metadata"]["name"]
        try:
            created = await self._kubernetes.create(PODS, manifest)
        except ApiError as error:
            if error.code == CONFLICT:
                return await self._adopt(job, name)
            if error.code == UNPROCESSABLE and RULES_FIELD in error.message:
                plain = without_restart_in_place(manifest)
                if plain is not None:
                    return await self._create_pod(job, plain)
            if error.code in (FORBIDDEN, UNPROCESSABLE):
                return Refused(f"pod {name}", classify(error.message), error.message)
            raise
        metrics.WRITES.labels("create pod").inc()
        self._cache.put_pod(created)
        if self._placer:
            self._placer.saw(created)
        return None

    async def _adopt(self, job: Job, name: str) -> Refused | None:
        """A pod of that name exists: fine if it is ours, made by an earlier try of which we did not hear."""
        found = await self._kubernetes.get(PODS, job.namespace, name)
        if found is None:
            return None  # gone again; the next look shows it
        if owner := _other_owner(job, found):
            return Refused(f"pod {name}", Reason.NAME_TAKEN, f"a pod of that name exists and belongs to {owner}")
        self._cache.put_pod(found)
        return None

    async def _apply(self, job: Job, manifest: Manifest) -> Refused | None:
        """Create an object or bring it in line; nothing is written where its hash is as wanted.

        What no job controls, several share: each applies it in its own name, so that they do not undo each other's.
        """
        kind, meta = manifest["kind"], manifest["metadata"]
        shared = not any(owner["controller"] for owner in meta["ownerReferences"])
        suffix = f"-{job.uid}" if shared else ""
        annotation = HASH_ANNOTATION + suffix
        prefix = "/apis" if "/" in manifest["apiVersion"] else "/api"
        resource = Resource(f"{prefix}/{manifest['apiVersion']}", PLURALS[kind])
        wanted = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]
        found = await self._kubernetes.get(resource, meta["namespace"], meta["name"])
        what = f"{kind} {meta['name']}"
        if found is not None:
            if owner := _stranger(found) if shared else _other_owner(job, found):
                return Refused(what, Reason.NAME_TAKEN, f"one of that name exists and belongs to {owner}")
            if found["metadata"].get("annotations", {}).get(annotation) == wanted:
                return None
        try:
            await self._kubernetes.apply(
                resource, manifest | {"metadata": meta | {"annotations": {annotation: wanted}}}, FIELD_MANAGER + suffix
            )
        except ApiError as error:
            if error.code in (FORBIDDEN, UNPROCESSABLE):
                return Refused(what, classify(error.message), error.message)
            raise
        metrics.WRITES.labels(f"apply {kind}").inc()
        return None

    async def _patch_pod(self, job: Job, pod: Pod, operations: list[dict[str, Any]]) -> None:
        test_uid = {"op": "test", "path": "/metadata/uid", "value": pod.uid}
        patched = await self._kubernetes.json_patch(PODS, job.namespace, pod.name, [test_uid, *operations])
        metrics.WRITES.labels("patch pod").inc()
        self._cache.put_pod(patched)

    async def _delete_pod(self, job: Job, pod: Pod) -> None:
        left = await self._kubernetes.delete(PODS, job.namespace, pod.name, pod.uid)
        metrics.WRITES.labels("delete pod").inc()
        key = Key(job.namespace, job.name)
        meta = left["metadata"] if left and left.get("kind") == "Pod" else {}
        if left and (meta.get("deletionGracePeriodSeconds") or meta.get("finalizers")):
            self._cache.put_pod(left)
        else:
            self._cache.drop_pod(key, pod.name, pod.uid)


def render(status: Status) -> dict[str, Any]:
    """Render a status as the API server stores it."""
    rendered: dict[str, Any] = status.model_dump(by_alias=True, exclude_none=True)
    return rendered


def _pointer(kind: str, name: str) -> str:
    return f"/metadata/{kind}/{name.replace('/', '~1')}"


def _label(name: str, value: str | None) -> dict[str, Any]:
    path = _pointer("labels", name)
    return {"op": "remove", "path": path} if value is None else {"op": "add", "path": path, "value": value}


def _other_owner(job: Job, found: Manifest) -> str:
    """Name the owner of an object that is not this job's; empty where it is ours."""
    owner = next((item for item in found["metadata"].get("ownerReferences", ()) if item.get("controller")), None)
    if owner is None:
        return "nobody"
    return "" if owner["uid"] == job.uid else _described(owner)


def _stranger(found: Manifest) -> str:
    """Name the owner of an object that jobs do not share; empty where they do."""
    owners = found["metadata"].get("ownerReferences", ())
    if not owners:
        return "nobody"
    stranger = next((item for item in owners if item["kind"] != KIND or item.get("controller")), None)
    return _described(stranger) if stranger else ""


def _described(owner: Manifest) -> str:
    return f"{owner['kind']} {owner['name']} (uid {owner['uid']})"
