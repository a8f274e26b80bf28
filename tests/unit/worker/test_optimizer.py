"""What the optimizer does to a layer, and that its state goes into a checkpoint and back."""

import math

import torch
from torch import nn

from pipelinejob_worker.protocol import Optimizer
from pipelinejob_worker.train.optimizer import (
    build_optimizer,
    clip,
    layer_shapes,
    layer_state,
    load_layer_state,
    squared_gradient_norm,
    total_norm,
)


def layer(gradient: float = 2.0) -> nn.Linear:
    linear = nn.Linear(3, 2)
    for parameter in linear.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    return linear


def test_only_matrices_decay() -> None:
    linear = layer(gradient=0.0)
    before = {name: parameter.clone() for name, parameter in linear.named_parameters()}
    build_optimizer(Optimizer(learning_rate="0.1", weight_decay="0.5"), [linear]).step()
    assert torch.allclose(linear.weight, before["weight"] * 0.95)
    assert torch.equal(linear.bias, before["bias"])


def test_the_norm_is_that_of_all_gradients() -> None:
    first, second = layer(2.0), layer(1.0)
    assert total_norm([squared_gradient_norm(first), squared_gradient_norm(second)]) == math.sqrt(8 * 4 + 8 * 1)


def test_clipping_scales_to_the_limit_and_leaves_smaller_gradients_alone() -> None:
    linear = layer(2.0)
    norm = total_norm([squared_gradient_norm(linear)])
    clip([linear], norm, 100.0)
    clip([linear], norm, 0.0)
    assert torch.equal(linear.bias.grad, torch.full((2,), 2.0))
    clip([linear], norm, 1.0)
    assert math.isclose(total_norm([squared_gradient_norm(linear)]), 1.0, rel_tol=1e-6)


def test_a_restored_layer_takes_the_same_next_step() -> None:
    settings = Optimizer(learning_rate="0.1")
    original, restored = layer(), layer()
    optimizer, other = build_optimizer(settings, [original]), build_optimizer(settings, [restored])
    for _ in range(3):
        optimizer.step()
    state = {name: tensor.clone() for name, tensor in layer_state(original, optimizer).items()}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == layer_shapes(restored)
    load_layer_state(restored, other, state, step=3)
    optimizer.step()
    other.step()
    assert torch.equal(original.weight, restored.weight)
    assert torch.equal(original.bias, restored.bias)
