"""What the rules decide on: plain values, read from manifests, without any of their depth."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from pipelinejob_operator.build.names import (
    ATTEMPT_LABEL,
    GATE,
    MEMBERSHIP_ANNOTATION,
    OPENED_ANNOTATION,
    PIPELINE_LABEL,
    PIPELINES_LABEL,
    REPLACEMENT_LABEL,
    SPARE_LABEL,
    STAGE_LABEL,
    STAGES_LABEL,
)
from pipelinejob_operator.build.opening import Opened
from pipelinejob_operator.build.place import Place, Shape
from pipelinejob_worker.protocol import WORKER_CONTAINER, ExitCode, Progress, Termination

Manifest = dict[str, Any]
"""A Kubernetes object as the API server sends it."""

RESTARTING_CONDITION = "AllContainersRestarting"
"""The kubelet's condition while it starts all containers of a pod anew in place."""

LOG_LINES = 32
LOG_LINE_CHARACTERS = 1024


def parse_time(text: str | None) -> datetime | None:
    """Read an RFC 3339 time of the API server; None stays None."""
    return datetime.fromisoformat(text) if text else None


@dataclass(frozen=True)
class Ended:
    """How the worker container of a stage ended."""

    exit_code: int
    at: datetime | None
    reason: str = ""
    message: str = ""
    step: int = 0
    log_tail: tuple[str, ...] = ()
    progress: Progress | None = None
    """Where the stage stood at its end; None for an agent of protocol 1, or without an agent."""

    @classmethod
    def read(cls, terminated: Manifest) -> "Ended":
        """Read ``state.terminated``; its message is an agent's ``Termination``, or the end of the log."""
        code, at = int(terminated.get("exitCode", 0)), parse_time(terminated.get("finishedAt"))
        reason, text = terminated.get("reason", ""), terminated.get("message", "")
        try:
            told = Termination.model_validate(json.loads(text))
        except (ValueError, ValidationError):
            return cls(code, at, reason, "", 0, _tail(text.splitlines()))
        # The kubelet knows of an OOM kill, the agent does not; of all else the agent knows more.
        reason = reason if reason == "OOMKilled" else told.reason
        return cls(code, at, reason, told.message, told.step, _tail(told.log_tail), told.progress)


def _tail(lines: Sequence[str]) -> tuple[str, ...]:
    kept = [line.rstrip()[:LOG_LINE_CHARACTERS] for line in lines if line.strip()]
    return tuple(kept[-LOG_LINES:])


@dataclass(frozen=True)
class Waiting:
    """Why the worker container of a stage does not start."""

    reason: str
    message: str
    image: str


@dataclass(frozen=True, kw_only=True)
class Pod:
    """What stage pods and spares have in common."""

    name: str
    uid: str
    attempt: int
    node: str = ""
    address: str = ""
    phase: str = "Pending"
    reason: str = ""
    message: str = ""
    ready: bool = False
    scheduled: bool = False
    unschedulable: str = ""
    unschedulable_since: datetime | None = None
    """Since when kube-scheduler refuses it, or it waits behind our gate."""
    gate: int | None = None
    """Index of our scheduling gate, if it is still closed."""
    held: tuple[str, ...] = ()
    """Scheduling gates of others that are still closed."""
    finalizers: tuple[str, ...] = ()
    opened: Opened | None = None
    """What was noted when the gate was opened; None while it is closed, and for a pod of an earlier operator."""
    nominated: str = ""
    """The node that kube-scheduler clears for it by preemption."""
    membership: str | None = None
    """The annotation; None where the pod lacks it."""
    gone_by: datetime | None = None
    """When the pod should be gone, once its deletion was asked for."""
    without_grace: bool = False
    """Whether it is to go at once: for a moment a list still has it."""
    disruption: str = ""
    """Reason of the condition DisruptionTarget: who evicted or preempted it."""
    ended: Ended | None = None
    restarting: bool = False
    """Whether the kubelet is starting its containers anew in place, so that ``ended`` is not the end."""
    container_restarts: int = 0
    waiting: Waiting | None = None
    started: bool = False
    active: bool = True
    """Whether a container of it, ours or the user's, may still run; the phase says so only seconds later."""

    @property
    def terminating(self) -> bool:
        """Whether somebody deleted it and it is not gone yet."""
        return self.gone_by is not None

    @property
    def succeeded(self) -> bool:
        """Whether its worker container ended with exit code 0."""
        return self.ended is not None and self.ended.exit_code == ExitCode.SUCCEEDED

    @property
    def over(self) -> bool:
        """Whether its worker container has ended for good."""
        return (self.ended is not None and not self.restarting) or self.phase in ("Failed", "Succeeded")


@dataclass(frozen=True, kw_only=True)
class StagePod(Pod):
    """One stage's pod."""

    place: Place
    replacement: int | None = None
    """Which pod of its place it is; None where its agent does not recover by itself."""

    @classmethod
    def read(cls, manifest: Manifest) -> "StagePod":
        """Read a pod that carries our labels; raises KeyError or ValueError for one that does not."""
        labels = manifest["metadata"]["labels"]
        number = labels.get(REPLACEMENT_LABEL)
        return cls(place=_place(labels), replacement=None if number is None else int(number), **_facts(manifest))


@dataclass(frozen=True, kw_only=True)
class SparePod(Pod):
    """A pod without a stage that can take one over."""

    index: int

    @classmethod
    def read(cls, manifest: Manifest) -> "SparePod":
        """Read a pod that carries a spare's labels; raises KeyError or ValueError for one that does not."""
        return cls(index=int(manifest["metadata"]["labels"][SPARE_LABEL]), **_facts(manifest))


def _facts(manifest: Manifest) -> dict[str, Any]:
    """Read what every pod of a job has."""
    meta, spec, status = manifest["metadata"], manifest.get("spec", {}), manifest.get("status", {})
    conditions = {item["type"]: item for item in status.get("conditions", [])}
    bound = conditions.get("PodScheduled", {})
    stuck = bound.get("reason") == "Unschedulable"
    worker = next(
        (item for item in status.get("containerStatuses", []) if item["name"] == WORKER_CONTAINER),
        Manifest(),
    )
    state = worker.get("state", {})
    disruption = conditions.get("DisruptionTarget", {})
    gates = [gate["name"] for gate in spec.get("schedulingGates", [])]
    return {
        "name": meta["name"],
        "uid": meta["uid"],
        "attempt": int(meta["labels"][ATTEMPT_LABEL]),
        "node": spec.get("nodeName", ""),
        "address": status.get("podIP", ""),
        "phase": status.get("phase", "Pending"),
        "reason": status.get("reason", ""),
        "message": status.get("message", ""),
        "ready": conditions.get("Ready", {}).get("status") == "True",
        "scheduled": bool(spec.get("nodeName")),
        "unschedulable": bound.get("message", "") if stuck else "",
        "unschedulable_since": parse_time(bound.get("lastTransitionTime")) if stuck or GATE in gates else None,
        "gate": gates.index(GATE) if GATE in gates else None,
        "held": tuple(gate for gate in gates if gate != GATE),
        "finalizers": tuple(meta.get("finalizers", ())),
        "opened": Opened.read(meta.get("annotations", {}).get(OPENED_ANNOTATION)),
        "nominated": status.get("nominatedNodeName", ""),
        "membership": meta.get("annotations", {}).get(MEMBERSHIP_ANNOTATION),
        "gone_by": parse_time(meta.get("deletionTimestamp")),
        "without_grace": meta.get("deletionGracePeriodSeconds") == 0,
        "disruption": disruption.get("reason", "") if disruption.get("status") == "True" else "",
        "ended": Ended.read(state["terminated"]) if "terminated" in state else None,
        "restarting": conditions.get(RESTARTING_CONDITION, {}).get("status") == "True",
        "container_restarts": int(worker.get("restartCount", 0)),
        "waiting": _waiting(status),
        "started": "running" in state,
        "active": _active(status),
    }


def _place(labels: Mapping[str, str]) -> Place:
    """Read a pod's place; operators before protocol 3 made one pipeline and did not label it."""
    shape = Shape(int(labels[STAGES_LABEL]), int(labels.get(PIPELINES_LABEL, "1")))
    return Place(int(labels[STAGE_LABEL]), int(labels.get(PIPELINE_LABEL, "0")), shape)


def _active(status: Manifest) -> bool:
    """Whether the pod is not over: it has a container that is not terminated, or none was made yet."""
    if status.get("phase") in ("Succeeded", "Failed"):
        return False
    states = [item.get("state", {}) for item in status.get("containerStatuses", [])]
    sidecars = [item.get("state", {}) for item in status.get("initContainerStatuses", [])]
    return not states or not all("terminated" in state for state in [*states, *sidecars])


def _waiting(status: Manifest) -> Waiting | None:
    """Find the first container, ours or the user's, that the kubelet cannot start."""
    for item in [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]:
        if waiting := item.get("state", {}).get("waiting"):
            return Waiting(waiting.get("reason", ""), waiting.get("message", ""), item.get("image", ""))
    return None


@dataclass(frozen=True)
class Claim:
    """The checkpoint claim, as far as it exists."""

    name: str
    access_modes: frozenset[str]

    @property
    def one_node(self) -> bool:
        """Whether only pods of one node can mount it."""
        return not self.access_modes & {"ReadWriteMany", "ReadOnlyMany"}

    @property
    def one_pod(self) -> bool:
        """Whether only one pod can mount it."""
        return self.access_modes == {"ReadWriteOncePod"}


@dataclass(frozen=True)
class Failure:
    """The failure that came first, in the words of ``status.firstFailure``."""

    place: Place
    node: str
    pod: str
    exit_code: int
    reason: str
    message: str = ""
    step: int = 0
    log_tail: tuple[str, ...] = ()

    def sentence(self) -> str:
        """Say in one line which stage failed, where, and how."""
        where = f" on node {self.node}" if self.node else ""
        how = f" with exit code {self.exit_code}" if self.exit_code else ""
        detail = f": {self.message}" if self.message else ""
        log = f"; last log lines: {' | '.join(self.log_tail[-3:])}" if self.log_tail else ""
        return f"{self.place} (pod {self.pod}){where} failed{how} ({self.reason}){detail}{log}"
