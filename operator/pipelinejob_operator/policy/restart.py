"""Restart: whether the budget allows another one, and how long to wait before it."""

from collections.abc import Sequence
from datetime import datetime, timedelta

from pipelinejob_operator.api.recovery import Recovery
from pipelinejob_operator.api.status import FirstFailure
from pipelinejob_operator.policy.facts import Failure

FIRST_DELAY_SECONDS = 1
LONGEST_DELAY_SECONDS = 60
KEPT_TIMES = 1000
"""Longest ``status.restartTimes``: a larger maxRestarts counts as this many a window."""


def recent(restart_times: Sequence[datetime], recovery: Recovery, now: datetime) -> list[datetime]:
    """Restarts that count: those of the last ``windowSeconds``."""
    start = now - timedelta(seconds=recovery.window_seconds)
    return [time for time in restart_times if time > start][-KEPT_TIMES:]


def allowed(restart_times: Sequence[datetime], recovery: Recovery, now: datetime) -> bool:
    """Whether one more restart stays within ``maxRestarts`` a window."""
    return len(recent(restart_times, recovery, now)) < min(recovery.max_restarts, KEPT_TIMES)


def in_a_row(before: int, previous: FirstFailure | None, failure: Failure, reached_step: int) -> int:
    """Count the restarts in a row, this one included; a step past the previous failure's starts anew.

    ``reached_step`` is the last step that was reported before the failure.
    """
    progressed = previous is not None and max(failure.step, reached_step) > previous.step
    return 1 if progressed else before + 1


def delay(restarts_in_a_row: int) -> timedelta:
    """Back-off before the pods of a restart are created: 1, 2, 4 ... 60 seconds."""
    if restarts_in_a_row <= 0:
        return timedelta(0)
    doublings = min(restarts_in_a_row - 1, 16)
    return timedelta(seconds=min(FIRST_DELAY_SECONDS << doublings, LONGEST_DELAY_SECONDS))
