"""How long is too long, and how often is too often. Pure: times are arguments, in seconds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from pipelinejob_worker.protocol.base import Wire
from pipelinejob_worker.recovery.pulse import Doing, Signs

STOPPED_SECONDS = 0.5
SILENT_SECONDS = 5.0
LATE_SECONDS = 0.3
"""A judge whose own loop is so late does not judge: the machine was busy or asleep."""

UNMEASURED_STEP_DEADLINE = 600.0
SERVING_DEADLINE = 60.0
"""Of a stage's part in one batch that is served; stage 0 gives up a batch that is away for longer."""

LEAST_STEP_DEADLINE = 10.0
STEPS_TO_MEASURE = 3
STEP_FACTOR = 5.0
WAITING_FACTOR = 1.5
"""Who waits for others is judged later than who does not: the rank that hangs must be found before its victims."""

FREE_ATTEMPTS = 5
"""Incarnations in a row that may come to nothing before each further one waits longer."""

LONGEST_WAIT = 10.0
SAME_STEP_LIMIT = 5
LONGEST_DELAY = 60.0

Verdict = Literal["Stopped", "Silent", "Hung", "Stuck"]
"""Stopped: by a signal. Silent: no sign of life. Hung: the main thread does not move and waits for nobody. Stuck: it
waits for others, which is not its fault."""


def step_deadline(measured: Sequence[float], configured: float = 0) -> float:
    """Return after how long a step hangs, from the newest measured steps; ``configured`` decides if it is not 0.

    The first steps compile, connect and fill caches, so before some are measured the deadline is long.
    """
    if configured:
        return configured
    if len(measured) < STEPS_TO_MEASURE:
        return UNMEASURED_STEP_DEADLINE
    return max(LEAST_STEP_DEADLINE, STEP_FACTOR * max(measured))


def judge(signs: Signs, deadline: float, *, stopped: bool) -> Verdict | None:
    """Return what is wrong with a worker, or None. ``stopped``: whether a signal has stopped the process."""
    if stopped and signs.beat_age > STOPPED_SECONDS:
        return "Stopped"
    if signs.beat_age > SILENT_SECONDS:
        return "Silent"
    if signs.doing == Doing.WAITING:
        return "Stuck" if signs.moved_age > WAITING_FACTOR * deadline else None
    limit = deadline if signs.doing == Doing.COMPUTING else max(deadline, UNMEASURED_STEP_DEADLINE)
    return "Hung" if signs.moved_age > limit else None


class Punctual:
    """Tells a judge whether its own loop has come round in time. ``period``: the time it sleeps between two rounds."""

    def __init__(self, period: float) -> None:
        self._period = period
        self._last: float | None = None

    def fit_to_judge(self, now: float) -> bool:
        """Whether this round is not late."""
        last, self._last = self._last, now
        return last is not None and now - last <= self._period + LATE_SECONDS


class Crash(Wire):
    """A worker ended that should not have: when, and after which committed step."""

    at: float = Field(description="Seconds of the machine's monotonic clock.")
    step: int = Field(ge=0)


@dataclass(frozen=True)
class Retry:
    """Start another worker after this time."""

    delay: float


@dataclass(frozen=True)
class GiveUp:
    """Start no more."""

    reason: str


def wait_after(fruitless: int) -> float:
    """Return the seconds to wait after so many incarnations in a row that have come to nothing.

    They fail in milliseconds where, for instance, packets between two nodes do not pass, and would fill the log.
    """
    return 0.0 if fruitless <= FREE_ATTEMPTS else min(LONGEST_WAIT, 0.1 * 2.0 ** min(fruitless - FREE_ATTEMPTS, 10))


def after_crash(crashes: Sequence[Crash], now: float, *, budget: int, window: float) -> Retry | GiveUp:
    """Return what to do after the last of ``crashes``.

    More than ``budget`` within ``window`` end it, and so do several in a row at the same step: it would end so again.
    The first crash costs no time; each further one without a step in between doubles the delay.
    """
    recent = sum(now - crash.at <= window for crash in crashes)
    if recent > budget:
        return GiveUp(
            f"spec.recovery.maxRestarts: the worker has ended {recent} times within {window:g} s; allowed: {budget}"
        )
    in_a_row = 0
    for crash in reversed(crashes):
        if crash.step != crashes[-1].step:
            break
        in_a_row += 1
    if in_a_row >= SAME_STEP_LIMIT:
        return GiveUp(f"the worker has ended {in_a_row} times in a row after step {crashes[-1].step}")
    return Retry(0.0 if in_a_row < 2 else min(LONGEST_DELAY, 2.0 ** (in_a_row - 2)))
