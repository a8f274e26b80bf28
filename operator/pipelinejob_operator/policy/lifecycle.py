"""Lifecycle: what the user's own switches ask for: suspend, the deadline, and when a job is finished."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from pipelinejob_operator.api.status import Condition, Status
from pipelinejob_operator.api.v1alpha1 import Spec
from pipelinejob_operator.policy.facts import StagePod, parse_time
from pipelinejob_operator.policy.reasons import ConditionType


def finished(conditions: Sequence[Condition]) -> bool:
    """Whether the job has ended, well or not: that is final."""
    return any(item.type == ConditionType.SUCCEEDED and item.status != "Unknown" for item in conditions)


def succeeded(gang: Mapping[int, StagePod], size: int) -> bool:
    """Whether every stage of a gang (rank to pod) of ``size`` pods ended with exit code 0."""
    return all((pod := gang.get(rank)) is not None and pod.succeeded for rank in range(size))


def deadline(spec: Spec, status: Status) -> datetime | None:
    """When the job will have been active for too long; None without a deadline, or while it is not active.

    Time spent suspended does not count, because a resume sets ``startTime`` anew.
    """
    start = parse_time(status.start_time)
    if spec.active_deadline_seconds is None or start is None or spec.suspend:
        return None
    return start + timedelta(seconds=spec.active_deadline_seconds)
