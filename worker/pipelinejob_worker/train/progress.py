"""How far and how fast: the steps' measurements as a Progress."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelinejob_worker.pipeline.timeline import BUSY, Activity
from pipelinejob_worker.protocol import Progress, StageTiming
from pipelinejob_worker.train.loop import StepResult

WINDOW_STEPS = 10

_MEMBERS = {
    Activity.FORWARD: "forward_percent",
    Activity.BACKWARD: "backward_percent",
    Activity.WEIGHT: "weight_percent",
    Activity.UPDATE: "update_percent",
    Activity.WAITING: "waiting_percent",
    Activity.SENDING: "sending_percent",
}


@dataclass(frozen=True)
class Expectation:
    """What is known before the first step."""

    total_steps: int
    tokens_per_step: int
    flops_per_step: float
    """Of the model, forward and backward, without what activation checkpointing computes twice."""

    peak_flops: float | None
    """Of all stages' devices together in a second, where it is known."""

    layers: Sequence[str]
    """Of each stage."""

    bubble_limit: float
    predicted_seconds: float
    predicted_bubble: float


class Meter:
    """Averages over the last steps, without the first step of an incarnation, which also sets things up."""

    def __init__(self, expectation: Expectation) -> None:
        self._expected = expectation
        self._steps: deque[StepResult] = deque(maxlen=WINDOW_STEPS)
        self._finished = 0
        self._skipped = 0

    def step_finished(self, result: StepResult) -> None:
        """Note how long a step took and where each rank's time went."""
        if self._finished == 1:
            self._steps.clear()
        self._steps.append(result)
        self._finished += 1
        self._skipped += result.skipped

    def progress(self, step: int) -> Progress:
        """Return the progress after ``step`` finished steps; what is not measured here is left out."""
        expected = self._expected
        known = Progress(
            step=step,
            total_steps=expected.total_steps,
            bubble_limit_percent=100 * expected.bubble_limit,
            bubble_predicted_percent=100 * expected.predicted_bubble,
            step_predicted_seconds=expected.predicted_seconds,
            skipped_steps=self._skipped,
            stages=tuple(
                StageTiming(stage=stage, busy_percent=0, layers=layers) for stage, layers in enumerate(expected.layers)
            ),
        )
        if not self._steps:
            return known
        seconds = sum(result.seconds for result in self._steps) / len(self._steps)
        shares = self._shares(seconds)
        busy = [sum(share[activity] for activity in BUSY) for share in shares]
        flops = expected.flops_per_step / seconds
        return known.model_copy(
            update={
                "loss": self._steps[-1].loss,
                "tokens_per_second": expected.tokens_per_step / seconds,
                "bubble_percent": max(0.0, 100 * (1 - sum(busy) / len(busy))),
                "step_seconds": seconds,
                "model_tera_flops": flops / 1e12,
                "model_flops_percent": _percent(flops / expected.peak_flops if expected.peak_flops else None),
                "remaining_seconds": (expected.total_steps - step) * seconds,
                "stages": tuple(map(_timing, known.stages, shares, busy)),
            }
        )

    def _shares(self, seconds: float) -> list[dict[Activity, float]]:
        """Share of the step that each stage spends on each activity, a mean over steps and pipelines."""
        stages = len(self._expected.layers)
        return [
            {
                activity: sum(rank[activity] for result in self._steps for rank in result.rank_seconds[stage::stages])
                / (seconds * len(self._steps) * (len(self._steps[0].rank_seconds) // stages))
                for activity in Activity
            }
            for stage in range(stages)
        ]


def _timing(known: StageTiming, shares: Mapping[Activity, float], busy: float) -> StageTiming:
    parts = {_MEMBERS[activity]: round(100 * share) for activity, share in shares.items()}
    return known.model_copy(update={"busy_percent": round(100 * busy), **parts})


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
