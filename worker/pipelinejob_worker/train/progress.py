"""How far and how fast: the steps' measurements as a Progress."""

from collections import deque
from collections.abc import Sequence

from pipelinejob_worker.pipeline.partition import describe
from pipelinejob_worker.protocol import Progress, StageTiming

WINDOW_STEPS = 10


class Meter:
    """Averages over the last steps, without the first step of an incarnation, which also sets things up."""

    def __init__(self, total_steps: int, tokens_per_step: int, stages: Sequence[range], bubble_limit: float) -> None:
        self._total_steps = total_steps
        self._tokens_per_step = tokens_per_step
        self._stages = stages
        self._bubble_limit = bubble_limit
        self._steps: deque[tuple[float, Sequence[float]]] = deque(maxlen=WINDOW_STEPS)
        self._finished = 0

    def step_finished(self, seconds: float, busy_seconds: Sequence[float]) -> None:
        """Note how long a step took and how long each stage computed in it."""
        if self._finished == 1:
            self._steps.clear()
        self._steps.append((seconds, busy_seconds))
        self._finished += 1

    def progress(self, step: int, loss: float | None, last_checkpoint_step: int) -> Progress:
        """Return the progress after ``step`` finished steps."""
        known = Progress(
            step=step,
            total_steps=self._total_steps,
            loss=loss,
            bubble_limit_percent=100 * self._bubble_limit,
            last_checkpoint_step=last_checkpoint_step,
            stages=tuple(StageTiming(stage=i, busy_percent=0, layers=describe(r)) for i, r in enumerate(self._stages)),
        )
        if not self._steps:
            return known
        seconds = sum(duration for duration, _ in self._steps)
        shares = [sum(stage) / seconds for stage in zip(*(busy for _, busy in self._steps), strict=True)]
        return known.model_copy(
            update={
                "tokens_per_second": self._tokens_per_step * len(self._steps) / seconds,
                "bubble_percent": max(0.0, 100 * (1 - sum(shares) / len(shares))),
                "remaining_seconds": (self._total_steps - step) * seconds / len(self._steps),
                "stages": tuple(
                    timing.model_copy(update={"busy_percent": round(100 * share)})
                    for timing, share in zip(known.stages, shares, strict=True)
                ),
            }
        )
