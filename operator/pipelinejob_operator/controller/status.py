"""The status of a job as a pure function of what was seen and decided."""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from pipelinejob_operator.api.status import Condition, FirstFailure, ProgressStatus, StageStatus, Status, Summary
from pipelinejob_operator.build.job import Job
from pipelinejob_operator.build.names import pod_selector
from pipelinejob_operator.controller.located import Located
from pipelinejob_operator.controller.located import summary as crossings_summary
from pipelinejob_operator.controller.observed import Gang, key_of
from pipelinejob_operator.controller.progress import (
    NOT_PROTECTED_YET,
    checkpointed,
    progress_status,
    saved,
    stage_status,
)
from pipelinejob_operator.policy.facts import Failure, StagePod
from pipelinejob_operator.policy.reasons import ConditionStatus, ConditionType, Reason
from pipelinejob_worker.protocol import ExitCode, Progress

MESSAGE_LIMIT = 2048
"""Longest message of a condition: long enough for a scheduler's words, short enough for a terminal."""


_UNTOLD: tuple[ConditionStatus, Reason, str] = ("Unknown", Reason.NOT_STARTED, "")


def rfc3339(time: datetime) -> str:
    """Render a time as the API server does, in whole seconds."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Draft:
    """The next status, while a plan decides on it; it starts as the present one."""

    def __init__(self, job: Job, now: datetime) -> None:
        self._job = job
        self._now = now
        self._fields: dict[str, Any] = {
            "observed_generation": job.generation,
            "selector": pod_selector(job.name),
        }
        self._conditions = {item.type: item for item in job.status.conditions}
        absent = {
            *(() if _saves(job) else (ConditionType.CHECKPOINTED,)),
            *(() if job.spec.serve else (ConditionType.AVAILABLE,)),
            *(() if job.recovers and job.spec.mode == "Train" else (ConditionType.PROTECTED,)),
        }
        self._shown = [kind for kind in ConditionType if kind not in absent]
        for kind in self._shown:
            if kind not in self._conditions:
                begin = {
                    ConditionType.CHECKPOINTED: saved(job.status.progress.last_checkpoint_step),
                    ConditionType.PROTECTED: NOT_PROTECTED_YET,
                }
                self.condition(kind, *begin.get(kind, _UNTOLD))

    def condition(self, kind: ConditionType, status: ConditionStatus, reason: Reason, message: str) -> None:
        """Set a condition; its transition time moves only when its status changes."""
        old = self._conditions.get(kind)
        since = old.last_transition_time if old and old.status == status else rfc3339(self._now)
        self._conditions[kind] = Condition(
            type=kind,
            status=status,
            observed_generation=self._job.generation,
            last_transition_time=since,
            reason=reason,
            message=message[:MESSAGE_LIMIT],
        )

    def told(self, kind: ConditionType) -> Condition:
        """Return a condition as it is told now."""
        return self._conditions[kind]

    def set(self, **fields: Any) -> None:
        """Set members of the status by their names."""
        self._fields |= fields

    def retire(self) -> None:
        """Raise the attempt: pods are numbered anew in it, and form a group of their own."""
        stages = [
            item.model_copy(
                update={
                    "replacement": 0,
                    "replacement_time": None,
                    "replacement_step": 0,
                    "quick_replacements": 0,
                    "container_restarts": 0,
                }
            )
            for item in self.stages
        ]
        self.set(attempt=self._job.status.attempt + 1, group=None, protection=None, stages=stages)

    @property
    def stages(self) -> list[StageStatus]:
        """What the status will say of the stages."""
        stages: list[StageStatus] = self._fields.get("stages", self._job.status.stages)
        return stages

    def gang(self, gang: Gang, progress: Progress | None) -> None:
        """Copy what the pods and an agent show."""
        old = {(item.pipeline, item.index): item for item in self._job.status.stages}
        shown = [(place, gang.current.get(place.rank)) for place in gang.shape.places()]
        stages = []
        for place, pod in (*shown, *gang.joining.items()):
            fresh = StageStatus(index=place.stage, pipeline=place.pipeline)
            before = old.get(key_of(place), fresh)
            seen: dict[str, Any] = (
                {"pod": pod.name, "node": pod.node, "state": stage_state(pod), "replacement": pod.replacement or 0}
                if pod
                else {"pod": "", "node": "", "domains": [], "state": "Pending"}
            )
            stages.append(before.model_copy(update=seen))
        self.set(stages=stages, ready_stages=sum(pod.ready for pod in gang.current.values()))
        if progress:
            self._progress(progress)

    def located(self, located: Located) -> None:
        """Copy how near the stages are to each other."""
        stages: list[StageStatus] = self._fields.get("stages", self._job.status.stages)
        self.set(
            placement=located.status,
            stages=[
                item.model_copy(update={"domains": list(located.domains.get((item.pipeline, item.index), ()))})
                for item in stages
            ],
        )

    def _progress(self, progress: Progress) -> None:
        """Copy how far the pipeline is, and where its stages' time went."""
        timings = {item.stage: item for item in progress.stages}
        self.set(
            progress=progress_status(progress),
            stages=[
                stage_status(item, timing) if (timing := timings.get(item.index)) else item
                for item in self._fields["stages"]
            ],
        )
        self.condition(ConditionType.CHECKPOINTED, *checkpointed(progress))

    def last_words(self, pods: Iterable[StagePod]) -> None:
        """Take over what stages said that ended in good order: no agent is left to ask.

        All stages end at the same step, and with a checkpoint of it where a volume is set.
        """
        in_order = (ExitCode.SUCCEEDED, ExitCode.DRAINED)
        ends = [pod.ended for pod in pods if pod.ended and pod.ended.exit_code in in_order]
        last = max(ends, key=lambda end: end.step, default=None)
        before: ProgressStatus = self._fields.get("progress", self._job.status.progress)
        if not self._job.runs_agent or last is None or not last.step or last.step < before.step:
            return
        if last.progress:
            self._progress(last.progress)
        else:
            concluded = self._by_step_alone(last.step, before)
            self.set(progress=concluded)
            self.condition(ConditionType.CHECKPOINTED, *saved(concluded.last_checkpoint_step))

    def _by_step_alone(self, step: int, before: ProgressStatus) -> ProgressStatus:
        """Conclude the progress from the step, which is all that agents of protocol 1 leave behind."""
        train = self._job.spec.train
        total = before.total_steps or (train.steps if train else step)
        saved = step if self._job.spec.checkpoint.volume_claim_name else before.last_checkpoint_step
        told: dict[str, int] = {
            "step": step,
            "total_steps": total,
            "percent": 100 * step // total,
            "last_checkpoint_step": saved,
        }
        if step == total:
            told["remaining_seconds"] = 0
        return before.model_copy(update=told)

    def failed_stage(self, failure: Failure, restarts_in_a_row: int) -> None:
        """Record the first failure and count it for its stage."""
        failed = (failure.place.stage, failure.place.pipeline)
        self.first_failure(failure)
        self.set(
            consecutive_restarts=restarts_in_a_row,
            stages=[
                item.model_copy(update={"restarts": item.restarts + ((item.index, item.pipeline) == failed)})
                for item in self.stages
            ],
        )

    def first_failure(self, failure: Failure) -> None:
        """Record the first failure."""
        self.set(
            first_failure=FirstFailure(
                stage=failure.place.stage,
                pipeline=failure.place.pipeline,
                node=failure.node,
                pod=failure.pod,
                exit_code=failure.exit_code,
                reason=failure.reason,
                message=failure.message[:MESSAGE_LIMIT],
                step=max(failure.step, self._job.status.progress.step),
                log_tail=list(failure.log_tail),
            )
        )

    def finish(self) -> Status:
        """Render the status."""
        conditions = [self._conditions[kind] for kind in self._shown]
        status = self._job.status.model_copy(update=self._fields | {"conditions": conditions})
        return status.model_copy(update={"summary": summary(self._job, status)})


def stage_state(pod: StagePod) -> str:
    """One word for a stage."""
    if pod.ended:
        return "Succeeded" if pod.succeeded else "Failed"
    if pod.phase == "Failed":
        return "Failed"
    if pod.ready:
        return "Running"
    return "Starting" if pod.scheduled else "Pending"


def _saves(job: Job) -> bool:
    """Whether checkpoints are written, and somebody tells of them."""
    return job.runs_agent and bool(job.spec.checkpoint.volume_claim_name)


def summary(job: Job, status: Status) -> Summary:
    """Ready-made strings for kubectl's columns."""
    progress = status.progress
    total = progress.total_steps
    done = sum(item.state == "Succeeded" for item in status.stages)
    return Summary(
        state=state(status),
        stages=f"{max(status.ready_stages, done)}/{job.shape.size}",
        step=f"{progress.step}/{total}" if total else "",
        progress=f"{progress.percent}%" if total else "",
        loss=_short_loss(progress.loss),
        tokens_per_second="" if progress.tokens_per_second is None else short_number(progress.tokens_per_second),
        bubble=_share(progress.bubble_percent),
        requests_per_second=progress.requests_per_second,
        queue="" if progress.queued is None else str(progress.queued),
        fronts=f"{status.ready_fronts}/{job.spec.serve.fronts}" if job.spec.serve else "",
        bubble_limit=_share(progress.bubble_limit_percent),
        model_flops=_share(progress.model_flops_percent),
        crossings=crossings_summary(status.placement),
    )


def _share(percent: int | None) -> str:
    return "" if percent is None else f"{percent}%"


def _short_loss(loss: str) -> str:
    return f"{float(loss):.3g}" if loss else ""


def short_number(value: int) -> str:
    """Render 950 as 950, 14200 as 14.2k, 3100000 as 3.1M."""
    for factor, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= factor:
            return f"{value / factor:.1f}{unit}"
    return str(value)


def state(status: Status) -> str:
    """One word for the whole job, derived from its conditions."""
    conditions = {item.type: item for item in status.conditions}
    running = Reason(conditions[ConditionType.RUNNING].reason)
    for word, kind, status_of_it in _WORDS:
        if conditions[kind].status == status_of_it and not (word == "Refused" and running in _ALIVE):
            return _NOT_RUNNING.get(running, word) if kind == ConditionType.RUNNING else word
    waiting = "Starting" if conditions[ConditionType.PLACED].status == "True" else "Pending"
    return _NOT_RUNNING.get(running, waiting)


_WORDS = (
    ("Succeeded", ConditionType.SUCCEEDED, "True"),
    ("Failed", ConditionType.SUCCEEDED, "False"),
    ("Suspended", ConditionType.SUSPENDED, "True"),
    ("Running", ConditionType.RUNNING, "True"),
    ("Refused", ConditionType.ACCEPTED, "False"),
)
_ALIVE = (Reason.RECOVERING, Reason.RESCALING, Reason.MOVING)
"""Reasons of a job that goes on in its old shape although the spec's is not accepted."""
_NOT_RUNNING = {
    Reason.STOPPING: "Stopping",
    Reason.RESTARTING: "Restarting",
    Reason.REPLACING: "Restarting",
    Reason.FAILURE_SEEN: "Restarting",
    Reason.DRAINING: "Restarting",
    Reason.RECOVERING: "Recovering",
    Reason.MOVING: "Recovering",
    Reason.RESCALING: "Rescaling",
}
