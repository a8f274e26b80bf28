"""What a job that serves has beside its stages: fronts, another job's model, the work of each pipeline. Pure."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from pipelinejob_operator.build.fronts import deployment
from pipelinejob_operator.build.installation import Installation
from pipelinejob_operator.build.job import Job
from pipelinejob_operator.controller.actions import Action, ApplyObject, CreatePod
from pipelinejob_operator.controller.observed import Fronts, Gang, Observed
from pipelinejob_operator.controller.status import Draft
from pipelinejob_operator.policy.facts import StagePod
from pipelinejob_operator.policy.reasons import ConditionStatus, ConditionType, Reason
from pipelinejob_worker.protocol import Progress, Serving

FRONTS_PATIENCE = timedelta(seconds=3)
AT_REST = frozenset({Reason.SUSPENDED, Reason.STOPPING, Reason.FINISHED, Reason.NOT_ACCEPTED})
"""Reasons why nothing shall run: then there is nothing to be answered, and no front is needed."""


def fronts(manifest: dict[str, Any], pods: int) -> Fronts:
    """Read the fronts' Deployment. ``pods``: how many of its pods there are."""
    status = manifest.get("status", {})
    failures = [item for item in status.get("conditions", []) if item["type"] == "ReplicaFailure"]
    return Fronts(
        wanted=manifest["spec"].get("replicas", 1),
        ready=status.get("readyReplicas", 0),
        pods=pods,
        problem=failures[0].get("message", "") if failures else "",
    )


def asked(job: Job, gang: Mapping[int, StagePod]) -> list[tuple[int, list[StagePod]]]:
    """Pods that know how far the job is, in parts whose answers add up.

    Any stage that trains knows it of the whole job. Where a job serves, stage 0 of each pipeline knows its own work;
    the others of the pipeline are asked when it does not answer, for they know of failures, too.
    """
    pods = [gang[rank] for rank in sorted(gang)]
    if job.spec.mode == "Train":
        return [(0, pods)]
    parts = {pod.place.pipeline for pod in pods}
    return [(part, [pod for pod in pods if pod.place.pipeline == part]) for part in sorted(parts)]


def progress(seen: Observed) -> Progress | None:
    """How far the job is: what one agent told, or what those of all pipelines told together."""
    told = [answer.progress for answer in seen.pipelines]
    if len(told) < 2:
        return told[0] if told else seen.agent.progress if seen.agent else None
    served = [item.serving or Serving() for item in told]
    return told[0].model_copy(
        update={
            "tokens_per_second": sum(item.tokens_per_second or 0 for item in told),
            "bubble_percent": _mean([item.bubble_percent for item in told if item.bubble_percent is not None]),
            "serving": Serving(
                requests_per_second=sum(item.requests_per_second for item in served),
                prompt_tokens_per_second=sum(item.prompt_tokens_per_second for item in served),
                queued=sum(item.queued for item in served),
                running=sum(item.running for item in served),
                cache_percent=_mean([item.cache_percent for item in served]) or 0,
                preemptions=sum(item.preemptions for item in served),
            ),
        }
    )


def makeable(actions: Sequence[Action], seen: Observed) -> list[Action]:
    """Leave out what cannot be made while the model is not known; what runs goes on."""
    if seen.source_problem is None:
        return list(actions)
    return [action for action in actions if not isinstance(action, ApplyObject | CreatePod)]


def idle_fronts(job: Job, seen: Observed, draft: Draft, installation: Installation) -> list[Action]:
    """End the fronts of a job that shall not run."""
    return no_fronts(job, seen, installation) if _rests(draft) else []


def no_fronts(job: Job, seen: Observed, installation: Installation) -> list[Action]:
    """End the fronts, if there are any."""
    if job.spec.serve is None or seen.fronts is None or not seen.fronts.wanted:
        return []
    return [ApplyObject(deployment(job, job.spec.serve, installation, replicas=0))]


def tell(job: Job, seen: Observed, draft: Draft) -> None:
    """Say whether a client would be answered now."""
    ready = seen.fronts.ready if seen.fronts else 0
    draft.set(ready_fronts=ready)
    draft.condition(ConditionType.AVAILABLE, *_available(job, seen, draft, ready))


def alarms(job: Job, seen: Observed, draft: Draft, now: datetime) -> list[datetime]:
    """When to look at the fronts again: of their Deployment nothing is watched but its pods."""
    if _rests(draft) or (job.spec.serve and seen.fronts and seen.fronts.ready >= job.spec.serve.fronts):
        return []
    return [now + FRONTS_PATIENCE]


def _available(job: Job, seen: Observed, draft: Draft, ready: int) -> tuple[ConditionStatus, Reason, str]:
    serve = job.spec.serve
    assert serve is not None
    if _rests(draft):
        running = draft.told(ConditionType.RUNNING)
        return "False", Reason(running.reason), running.message
    if not ready:
        why = f": {seen.fronts.problem}" if seen.fronts and seen.fronts.problem else ""
        return "False", Reason.FRONTS_NOT_READY, f"0 of {serve.fronts} fronts are ready{why}"
    pipelines = _ready_pipelines(job, seen)
    if not pipelines:
        wait = serve.limits.recovery_seconds
        return "False", Reason.NO_PIPELINE_READY, f"no pipeline is ready; accepted requests wait for up to {wait} s"
    counts = f"{ready} of {serve.fronts} fronts and {pipelines} of {job.spec.pipelines} pipelines are ready"
    missing = f"; {seen.source_problem.message}" if seen.source_problem else ""
    return "True", Reason.SERVING, counts + missing


def _ready_pipelines(job: Job, seen: Observed) -> int:
    gang = Gang.of(job, seen).current
    ready = [pod.place.pipeline for pod in gang.values() if pod.ready]
    return sum(ready.count(pipeline) == job.spec.stages for pipeline in range(job.spec.pipelines))


def _rests(draft: Draft) -> bool:
    return draft.told(ConditionType.RUNNING).reason in AT_REST


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
