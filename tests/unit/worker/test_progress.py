"""Speed, bubble and where the time goes, as averages over the last steps."""

import pytest

from pipelinejob_worker.pipeline.timeline import Activity
from pipelinejob_worker.train.loop import StepResult
from pipelinejob_worker.train.progress import WINDOW_STEPS, Expectation, Meter


def meter(peak_flops: float | None = None) -> Meter:
    return Meter(
        Expectation(
            total_steps=100,
            tokens_per_step=1000,
            flops_per_step=4e12,
            peak_flops=peak_flops,
            layers=["0-1", "2-4"],
            bubble_limit=0.2,
            predicted_seconds=1.5,
            predicted_bubble=0.25,
        )
    )


def step(seconds: float, *busy: float, loss: float = 1.0, skipped: bool = False, waiting: float = 0.0) -> StepResult:
    """A step in which rank n computed for ``busy[n]`` seconds, a quarter of it forward."""
    ranks = [
        dict.fromkeys(Activity, 0.0)
        | {
            Activity.FORWARD: time / 4,
            Activity.BACKWARD: time / 2,
            Activity.WEIGHT: time / 4,
            Activity.WAITING: waiting,
        }
        for time in busy
    ]
    return StepResult(loss, seconds, ranks, [], skipped)


def test_before_the_first_step_only_the_plan_is_known() -> None:
    progress = meter().progress(0)
    assert (progress.step, progress.total_steps, progress.loss, progress.tokens_per_second) == (0, 100, None, None)
    assert (progress.bubble_limit_percent, progress.bubble_predicted_percent) == (20, 25)
    assert progress.step_predicted_seconds == 1.5
    assert [stage.layers for stage in progress.stages] == ["0-1", "2-4"]


def test_a_step_gives_speed_bubble_and_the_time_that_is_left() -> None:
    speed = meter()
    speed.step_finished(step(2.0, 1.6, 0.8, loss=2.5, waiting=0.2))
    progress = speed.progress(10)
    assert (progress.step, progress.loss) == (10, 2.5)
    assert progress.tokens_per_second == 500
    assert progress.bubble_percent == pytest.approx(40)
    assert (progress.step_seconds, progress.remaining_seconds) == (2, 180)
    assert [stage.busy_percent for stage in progress.stages] == [80, 40]
    first = progress.stages[0]
    assert (first.forward_percent, first.backward_percent, first.weight_percent) == (20, 40, 20)
    assert (first.waiting_percent, first.sending_percent, first.update_percent) == (10, 0, 0)


def test_a_stage_is_the_mean_of_its_copies() -> None:
    speed = meter()
    speed.step_finished(step(1.0, 0.2, 0.4, 0.6, 0.8))
    progress = speed.progress(1)
    assert [stage.busy_percent for stage in progress.stages] == [40, 60]
    assert progress.bubble_percent == pytest.approx(50)


def test_utilization_is_known_where_the_peak_is() -> None:
    for peak, percent in ((None, None), (20e12, 10.0)):
        speed = meter(peak)
        speed.step_finished(step(2.0, 1.0, 1.0))
        progress = speed.progress(1)
        assert progress.model_tera_flops == pytest.approx(2)
        assert progress.model_flops_percent == (percent if percent is None else pytest.approx(percent))


def test_the_first_step_counts_only_until_there_is_another() -> None:
    speed = meter()
    speed.step_finished(step(100.0, 1.0, 1.0))
    assert speed.progress(1).tokens_per_second == 10
    speed.step_finished(step(1.0, 1.0, 1.0))
    speed.step_finished(step(3.0, 1.0, 1.0))
    assert speed.progress(3).tokens_per_second == 500


def test_old_steps_are_forgotten_but_skipped_ones_are_counted() -> None:
    speed = meter()
    speed.step_finished(step(5.0, 0.5, 0.5, skipped=True))
    speed.step_finished(step(5.0, 0.5, 0.5, skipped=True))
    for _ in range(WINDOW_STEPS):
        speed.step_finished(step(1.0, 0.5, 0.5))
    assert speed.progress(12).tokens_per_second == 1000
    assert speed.progress(12).skipped_steps == 2
