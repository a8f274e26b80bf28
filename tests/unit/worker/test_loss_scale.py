"""The dynamic loss scale follows torch's own."""

import random

import torch

from pipelinejob_worker.train.loss_scale import GROWTH_INTERVAL, LARGEST, SMALLEST, LossScale


def torch_scale_after(scaler: torch.amp.GradScaler, finite: bool) -> float:
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.tensor([1.0 if finite else float("inf")])
    optimizer = torch.optim.SGD([weight])
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale()


def test_the_scale_is_that_of_torch_after_every_step() -> None:
    scaler, scale = torch.amp.GradScaler("cpu"), LossScale()
    assert scale.scale == scaler.get_scale()
    overflows = {*random.Random(7).sample(range(GROWTH_INTERVAL), 3), 2 * GROWTH_INTERVAL + 500}
    for step in range(4 * GROWTH_INTERVAL):
        scale = scale.after(step not in overflows)
        assert scale.scale == torch_scale_after(scaler, step not in overflows), step


def test_an_overflow_halves_the_scale_and_starts_the_count_anew() -> None:
    assert LossScale(1024.0, 1999).after(finite=False) == LossScale(512.0, 0)


def test_the_scale_stays_within_its_bounds() -> None:
    assert LossScale(LARGEST, GROWTH_INTERVAL - 1).after(finite=True).scale == LARGEST
    assert LossScale(SMALLEST).after(finite=False).scale == SMALLEST


def test_it_is_exhausted_when_nothing_is_left_to_halve() -> None:
    assert not LossScale(2.0).exhausted
    assert LossScale(2.0).after(finite=False).exhausted


def test_it_survives_a_checkpoint() -> None:
    scale = LossScale(4096.0, 17)
    assert LossScale.from_numbers({"updates": 3.0, **scale.to_numbers()}) == scale


def test_a_checkpoint_of_another_precision_starts_with_the_initial_scale() -> None:
    assert LossScale.from_numbers({"updates": 3.0}) == LossScale()
