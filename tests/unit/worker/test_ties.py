"""Weights that two layers share, on one rank or on two."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import distributed, nn

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.models import Tie
from pipelinejob_worker.pipeline.replicas import Replicas
from pipelinejob_worker.pipeline.ties import TiedGradients, counted_elsewhere, tied_parameters
from pipelinejob_worker.protocol import Optimizer
from pipelinejob_worker.train.optimizer import StageOptimizer, squared_gradient_norms
from tests.unit.worker.ranks import on_ranks

TIES = (Tie(0, "weight", 2, "weight"), Tie(0, "extra", 1, "bias"))
STAGES = [(0,), (1, 2)]
STEPS = 3
RATE = 0.1


def build() -> dict[int, nn.Module]:
    torch.manual_seed(3)
    first = nn.Embedding(5, 4)
    middle, last = nn.Linear(4, 4), nn.Linear(4, 5, bias=False)
    first.register_parameter("extra", nn.Parameter(middle.bias.detach().clone()))
    last.weight = nn.Parameter(first.weight.detach().clone())
    return {0: first, 1: middle, 2: last}


def gradient(step: int, index: int, name: str, copy: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(hash((step, index, copy, len(name))) % 2**31)
    return torch.randn(build()[index].get_parameter(name).shape, generator=generator)


def set_gradients(layers: Mapping[int, nn.Module], step: int, copy: int = 0) -> None:
    for index, layer in layers.items():
        for name, parameter in layer.named_parameters():
            parameter.grad = gradient(step, index, name, copy)


def weights(layers: Mapping[int, nn.Module]) -> dict[str, Any]:
    return {f"{i}.{name}": p.tolist() for i, layer in layers.items() for name, p in layer.named_parameters()}


def reference(copies: int = 1) -> dict[str, Any]:
    """One process whose ends are parameters of their own; the sums of both are added once a step."""
    layers = build()
    optimizer = StageOptimizer(Optimizer(), layers)
    for step in range(STEPS):
        for index, layer in layers.items():
            for name, parameter in layer.named_parameters():
                parameter.grad = gradient(step, index, name, 0)
                for copy in range(1, copies):
                    parameter.grad += gradient(step, index, name, copy)
        for first, name, last, last_name in TIES:
            total = layers[first].get_parameter(name).grad + layers[last].get_parameter(last_name).grad
            layers[first].get_parameter(name).grad = total
            layers[last].get_parameter(last_name).grad = total
        optimizer.step(RATE)
    return weights(layers)


def stage_of(layer: int) -> int:
    return next(stage for stage, layers in enumerate(STAGES) if layer in layers)


def train_stage() -> tuple[dict[str, Any], list[float]]:
    """One of two stages without copies; returns its weights and the squared norms of the tied gradients it counts."""
    layers = {index: layer for index, layer in build().items() if stage_of(index) == distributed.get_rank()}
    ties = TiedGradients(TIES, layers, stage_of)
    optimizer = StageOptimizer(Optimizer(), layers)
    norms = []
    for step in range(STEPS):
        set_gradients(layers, step)
        ties.sum()
        norms.append(sum(map(sum, squared_gradient_norms(layers, counted_elsewhere(TIES)).values())))
        optimizer.step(RATE)
    return weights(layers), norms


def test_two_stages_have_the_bits_of_one_process() -> None:
    (first, first_norms), (last, last_norms) = on_ranks(2, train_stage)
    expected = reference()
    assert first | last == expected
    assert expected["0.weight"] == expected["2.weight"]
    assert expected["0.extra"] == expected["1.bias"]
    middle = [gradient(step, 1, "weight").double().norm().item() ** 2 for step in range(STEPS)]
    assert last_norms == middle, "the last ends are counted by the first"
    assert all(norm > 0 for norm in first_norms)


def test_one_rank_with_both_ends_has_the_same_bits() -> None:
    layers = build()
    ties = TiedGradients(TIES, layers, lambda _: 0)
    optimizer = StageOptimizer(Optimizer(), layers)
    for step in range(STEPS):
        set_gradients(layers, step)
        ties.sum()
        optimizer.step(RATE)
    assert weights(layers) == reference()


def train_copy_of_stage() -> dict[str, Any]:
    """One of two stages with two copies each: ranks 0 and 1 are pipeline 0."""
    copy, stage = divmod(distributed.get_rank(), 2)
    groups = [distributed.new_group([0, 2]), distributed.new_group([1, 3])]
    layers = {index: layer for index, layer in build().items() if stage_of(index) == stage}
    replicas = Replicas(layers, groups[stage], tied_parameters(TIES))
    optimizer = StageOptimizer(Optimizer(), layers, replicas.owned)
    ties = TiedGradients(TIES, layers, stage_of)
    for step in range(STEPS):
        optimizer.zero_grad()
        set_gradients(layers, step, copy)
        for index in layers:
            replicas.start(index)
        replicas.finish()
        if copy == 0:
            ties.sum()
        optimizer.step(RATE)
        replicas.publish()
    return weights(layers)


def test_copies_of_two_stages_have_the_bits_of_one_process() -> None:
    ranks = on_ranks(4, train_copy_of_stage)
    assert ranks[0] | ranks[1] == ranks[2] | ranks[3] == reference(copies=2)


def test_each_end_has_a_sum_of_its_own() -> None:
    layers = build()
    set_gradients(layers, 0)
    TiedGradients(TIES, layers, lambda _: 0).sum()
    one, other = layers[0].weight.grad, layers[2].weight.grad
    assert torch.equal(one, gradient(0, 0, "weight") + gradient(0, 2, "weight"))
    assert torch.equal(one, other)
    one.zero_()
    assert other.any(), "clipping scales each end, so they must not share memory"


def test_an_end_without_a_gradient_counts_as_zero() -> None:
    layers = build()
    set_gradients(layers, 0)
    layers[0].weight.grad = None
    TiedGradients(TIES, layers, lambda _: 0).sum()
    assert torch.equal(layers[0].weight.grad, gradient(0, 2, "weight"))


def test_a_frozen_weight_stays_without_a_gradient() -> None:
    layers = build()
    for index in (0, 2):
        layers[index].weight.requires_grad_(False)
    TiedGradients(TIES[:1], layers, lambda _: 0).sum()
    assert layers[0].weight.grad is None


def test_a_weight_with_three_ends_is_refused() -> None:
    ties = [Tie(0, "weight", 1, "weight"), Tie(0, "weight", 2, "weight")]
    with pytest.raises(ConfigurationError, match=r"spec.model: .*name a parameter twice; allowed: two ends"):
        TiedGradients(ties, build(), lambda _: 0)
