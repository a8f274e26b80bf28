"""Speed and bubble as averages over the last steps."""

import pytest

from pipelinejob_worker.train.progress import WINDOW_STEPS, Meter


def meter() -> Meter:
    return Meter(total_steps=100, tokens_per_step=1000, stages=[range(0, 2), range(2, 5)], bubble_limit=0.2)


def test_before_the_first_step_only_the_plan_is_known() -> None:
    progress = meter().progress(0, None, 0)
    assert (progress.step, progress.total_steps, progress.loss, progress.tokens_per_second) == (0, 100, None, None)
    assert progress.bubble_limit_percent == 20
    assert [stage.layers for stage in progress.stages] == ["0-1", "2-4"]


def test_a_step_gives_speed_bubble_and_the_time_that_is_left() -> None:
    speed = meter()
    speed.step_finished(2.0, [1.5, 0.5])
    progress = speed.progress(10, 2.5, 8)
    assert (progress.step, progress.loss, progress.last_checkpoint_step) == (10, 2.5, 8)
    assert progress.tokens_per_second == 500
    assert progress.bubble_percent == pytest.approx(50)
    assert progress.remaining_seconds == 180
    assert [stage.busy_percent for stage in progress.stages] == [75, 25]


def test_the_first_step_counts_only_until_there_is_another() -> None:
    speed = meter()
    speed.step_finished(100.0, [1.0, 1.0])
    assert speed.progress(1, 1.0, 0).tokens_per_second == 10
    speed.step_finished(1.0, [1.0, 1.0])
    speed.step_finished(3.0, [1.0, 1.0])
    assert speed.progress(3, 1.0, 0).tokens_per_second == 500


def test_old_steps_are_forgotten() -> None:
    speed = meter()
    for seconds in (5.0, 5.0, *[1.0] * WINDOW_STEPS):
        speed.step_finished(seconds, [0.5, 0.5])
    assert speed.progress(12, 1.0, 0).tokens_per_second == 1000
