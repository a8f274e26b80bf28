"""What agents tell, in the words of the status: whole numbers with the unit in the name, and a condition. Pure."""

from typing import Any

from pipelinejob_operator.api.recovery_status import LastRecovery, Protection
from pipelinejob_operator.api.status import ProgressStatus, StageStatus
from pipelinejob_operator.policy.reasons import ConditionStatus, Reason
from pipelinejob_worker.protocol import RECOVERY_SINCE, AgentStatus, Progress, Serving, StageTiming

SHARES = (
    "busy_percent",
    "forward_percent",
    "backward_percent",
    "weight_percent",
    "update_percent",
    "waiting_percent",
    "sending_percent",
)


def progress_status(progress: Progress) -> ProgressStatus:
    """Round an agent's progress to what people read; so that small changes are none."""
    return ProgressStatus(
        step=progress.step,
        total_steps=progress.total_steps,
        percent=100 * progress.step // progress.total_steps if progress.total_steps else 0,
        loss=_loss(progress.loss),
        validation_loss=_loss(progress.validation_loss),
        validation_step=progress.validation_step,
        tokens_per_second=_rounded(progress.tokens_per_second),
        step_milliseconds=_rounded(progress.step_seconds, 1e3),
        step_predicted_milliseconds=_rounded(progress.step_predicted_seconds, 1e3),
        bubble_percent=_rounded(progress.bubble_percent),
        bubble_limit_percent=_rounded(progress.bubble_limit_percent),
        bubble_predicted_percent=_rounded(progress.bubble_predicted_percent),
        model_flops_percent=_rounded(progress.model_flops_percent),
        model_giga_flops_per_second=_rounded(progress.model_tera_flops, 1e3),
        skipped_steps=progress.skipped_steps,
        remaining_seconds=_rounded(progress.remaining_seconds),
        last_checkpoint_step=progress.last_checkpoint_step,
        **_served(progress.serving),
    )


def _served(serving: Serving | None) -> dict[str, Any]:
    if serving is None:
        return {}
    return {
        "requests_per_second": f"{serving.requests_per_second:.3g}",
        "prompt_tokens_per_second": round(serving.prompt_tokens_per_second),
        "running": serving.running,
        "queued": serving.queued,
        "cache_percent": round(serving.cache_percent),
    }


def stage_status(before: StageStatus, timing: StageTiming) -> StageStatus:
    """Show which layers a stage holds and where its time went."""
    shares = {name: getattr(timing, name) for name in SHARES}
    return before.model_copy(update={"layers": timing.layers, **shares})


def checkpointed(progress: Progress) -> tuple[ConditionStatus, Reason, str]:
    """Conclude the condition Checkpointed."""
    if progress.checkpoint_problem:
        reason = Reason.CHECKPOINT_DAMAGED if progress.checkpoint_damaged else Reason.CHECKPOINT_FAILED
        return "False", reason, progress.checkpoint_problem
    return saved(progress.last_checkpoint_step)


def saved(step: int) -> tuple[ConditionStatus, Reason, str]:
    """The condition Checkpointed while nothing is known to be wrong; ``step`` is 0 before the first checkpoint."""
    if step:
        return "True", Reason.SAVED, f"the newest checkpoint is of step {step}"
    return "Unknown", Reason.NOT_SAVED_YET, "no checkpoint has been written yet"


NOT_PROTECTED_YET: tuple[ConditionStatus, Reason, str] = (
    "Unknown",
    Reason.NOT_PROTECTED_YET,
    "no snapshot has been taken yet",
)


def protection(agent: AgentStatus) -> Protection:
    """Copy how well the newest steps are kept."""
    told = agent.protection
    return Protection(
        step=told.step,
        guarded_step=told.guarded_step,
        interval_steps=told.interval_steps,
        at_risk_steps=told.at_risk_steps,
        cost_percent=_rounded(told.cost_percent),
    )


def protected(agent: AgentStatus) -> tuple[ConditionStatus, Reason, str]:
    """Conclude the condition Protected."""
    if agent.protocol_version < RECOVERY_SINCE:
        return (
            "False",
            Reason.WORKER_TOO_OLD,
            f"the worker image speaks protocol {agent.protocol_version}, recovery of single stages needs "
            f"{RECOVERY_SINCE}: a failure restarts the whole gang; use an image of the operator's release",
        )
    told = agent.protection
    if told.problem:
        return "False", Reason.UNPROTECTED, told.problem
    if not told.interval_steps or not told.guarded_step:
        return NOT_PROTECTED_YET
    every = "each step" if told.interval_steps == 1 else f"every {told.interval_steps} steps"
    return "True", Reason.PROTECTED, f"the state of {every} is in the memory of two pods"


def last_recovery(agent: AgentStatus) -> LastRecovery | None:
    """Copy what the last recovery or rescale cost; None while there was none."""
    told = agent.recovery
    if told.last_pause_seconds is None:
        return None
    return LastRecovery(
        pause_milliseconds=_rounded(told.last_pause_seconds, 1e3),
        resumed_step=told.resumed_step,
        repeated_steps=told.steps_repeated,
    )


def _loss(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4g}"


def _rounded(value: float | None, factor: float = 1) -> int | None:
    return None if value is None else round(value * factor)
