"""Builders of jobs and pods for tests: everything has a sensible value, and a test names what it is about."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from pipelinejob_operator.api.status import Status
from pipelinejob_operator.build.installation import Installation
from pipelinejob_operator.build.job import Job
from pipelinejob_operator.build.names import pod_name
from pipelinejob_operator.build.place import Place, Shape
from pipelinejob_operator.controller.observed import Observed
from pipelinejob_operator.controller.plan import Plan, plan
from pipelinejob_operator.policy.facts import Ended, StagePod

NOW = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
UID = "job-uid"
THREE = Shape(3)
INSTALLATION = Installation(worker_image="worker:1", operator_namespace="operators")


def seconds(number: float) -> timedelta:
    return timedelta(seconds=number)


def manifest(status: Status | None = None, meta: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    """A PipelineJob as the API server would send it."""
    return {
        "metadata": {
            "name": "tiny",
            "namespace": "team",
            "uid": UID,
            "generation": 1,
            "resourceVersion": "7",
            **(meta or {}),
        },
        "spec": {
            "stages": 3,
            "model": {"preset": {"name": "gpt", "layers": 8, "width": 64, "heads": 4, "context": 32}},
            "train": {"data": {"files": ["/data/*"]}, "steps": 200, "globalBatchSize": 8, "microbatches": 4},
            **spec,
            "recovery": {"strategy": "RecreateAll"} | spec.get("recovery", {}),
        },
        "status": status.model_dump(by_alias=True, exclude_none=True) if status else {},
    }


def job(status: Status | None = None, **spec: Any) -> Job:
    return Job.read(manifest(status, **spec))


def place(stage: int, pipeline: int = 0, shape: Shape = THREE) -> Place:
    """A place among three stages, unless the test says otherwise."""
    return Place(stage, pipeline, shape)


def pod(stage: int, attempt: int = 0, *, pipeline: int = 0, shape: Shape = THREE, **facts: Any) -> StagePod:
    """A pod that is ready on its node, unless the test says otherwise."""
    where = place(stage, pipeline, shape)
    healthy: dict[str, Any] = {
        "name": pod_name("tiny", where, attempt),
        "uid": f"uid-{where.rank}-{attempt}",
        "place": where,
        "attempt": attempt,
        "node": f"node-{where.rank}",
        "address": f"10.0.0.{where.rank}",
        "phase": "Running",
        "ready": True,
        "scheduled": True,
        "started": True,
        "membership": "{}",
    }
    return StagePod(**(healthy | facts))


def gated(stage: int, attempt: int = 0, **facts: Any) -> StagePod:
    """A pod as it is right after its creation."""
    return pod(
        stage,
        attempt,
        **facts,
        node="",
        address="",
        phase="Pending",
        ready=False,
        scheduled=False,
        started=False,
        gate=0,
        membership="",
    )


def ended(stage: int, exit_code: int, attempt: int = 0, at: datetime = NOW, **facts: Any) -> StagePod:
    """A pod whose worker container has ended."""
    told: dict[str, Any] = {"reason": "Error"}
    told |= {key: facts.pop(key) for key in ("reason", "message", "step", "log_tail", "progress") if key in facts}
    phase = "Failed" if exit_code else "Succeeded"
    end = Ended(exit_code, at, **told)
    return pod(
        stage, attempt, **({"phase": phase, "ready": False, "started": False, "active": False, "ended": end} | facts)
    )


def leaving(some: StagePod) -> StagePod:
    """The same pod after its deletion was asked for, with 30 seconds of grace."""
    return replace(some, gone_by=NOW + seconds(30))


def decide(some: Job, *pods: StagePod, now: datetime = NOW, **seen: Any) -> Plan:
    """Plan from what is seen; Service and NetworkPolicy were looked at a moment ago."""
    return plan(some, Observed(pods=pods, **({"network_due": False} | seen)), now, INSTALLATION)


def settled(some: Job, *pods: StagePod, now: datetime = NOW, **seen: Any) -> Job:
    """The same job after its plan's status was written."""
    return replace(some, status=decide(some, *pods, now=now, **seen).status)


def running_job(**spec: Any) -> Job:
    """A job whose three stages run."""
    return settled(job(**spec), pod(0), pod(1), pod(2))


def told(made: Plan) -> dict[str, tuple[str, str]]:
    """Status and reason by condition."""
    return {item.type: (item.status, item.reason) for item in made.status.conditions}


def message(made: Plan, kind: str) -> str:
    return next(item.message for item in made.status.conditions if item.type == kind)


def kinds(made: Plan) -> list[str]:
    """Types of the actions, in order."""
    return [type(action).__name__ for action in made.actions]
