"""The learning rate over the steps of a job."""

import math

import pytest

from pipelinejob_worker.protocol import Optimizer
from pipelinejob_worker.train.learning_rate import learning_rate


def rates(total: int, **settings: object) -> list[float]:
    optimizer = Optimizer.model_validate({"learning_rate": "0.1", **settings})
    return [learning_rate(optimizer, step, total) for step in range(total)]


def test_a_constant_rate_without_warm_up_has_the_bits_of_the_setting() -> None:
    assert rates(3, learning_rate="3e-4") == [3e-4] * 3


def test_the_warm_up_rises_linearly_to_the_rate() -> None:
    assert rates(6, learning_rate="0.5", warmup_steps=4) == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]


def test_linear_decay_falls_from_the_end_of_the_warm_up_to_the_last_step() -> None:
    falling = rates(6, learning_rate="1", final_learning_rate="0.5", warmup_steps=2, decay="Linear")
    assert falling == [0.5, 1.0, 0.875, 0.75, 0.625, 0.5]


def test_cosine_decay_is_half_a_period() -> None:
    falling = rates(5, learning_rate="1", final_learning_rate="0.2", decay="Cosine")
    expected = [0.6 + 0.4 * math.cos(math.pi * step / 4) for step in range(5)]
    assert falling == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("decay", ["Cosine", "Linear"])
def test_the_last_step_has_exactly_the_final_rate(decay: str) -> None:
    for total in range(3, 40):
        assert rates(total, warmup_steps=2, final_learning_rate="0.007", decay=decay)[-1] == 0.007


@pytest.mark.parametrize("decay", ["Constant", "Cosine", "Linear"])
@pytest.mark.parametrize("warmup", [0, 1, 5, 9])
def test_a_job_that_ends_with_its_warm_up_does_not_decay(decay: str, warmup: int) -> None:
    total = max(warmup, 1)
    assert rates(total, warmup_steps=warmup, decay=decay)[-1] == 0.1


def test_a_job_that_ends_before_its_warm_up_never_reaches_the_rate() -> None:
    assert rates(2, learning_rate="1", warmup_steps=4, decay="Cosine") == [0.25, 0.5]
