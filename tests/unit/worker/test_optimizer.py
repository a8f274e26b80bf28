"""What the optimizer does to the layers of a stage, and that its state goes into a checkpoint and back."""

import math
from collections.abc import Mapping

import pytest
import torch
from torch import nn

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.protocol import Optimizer
from pipelinejob_worker.train.optimizer import (
    NormSlots,
    StageOptimizer,
    clip,
    parameter_counts,
    scale_gradients,
    squared_gradient_norms,
    total_norm,
)

ADAMW = Optimizer(weight_decay="0.3", beta1="0.8", beta2="0.95")
SGD = Optimizer(name="SGD", weight_decay="0.3", momentum="0.8")
PLAIN_SGD = Optimizer(name="SGD", weight_decay="0.3", momentum="0")
ALL = pytest.mark.parametrize("settings", [ADAMW, SGD, PLAIN_SGD], ids=["AdamW", "SGD with momentum", "SGD"])
RATES = [0.1, 0.05, 0.2, 0.01]


def stage(*indices: int) -> dict[int, nn.Module]:
    """Layers of matrices, vectors and a tensor of three dimensions; each has the same weights in every stage."""
    layers: dict[int, nn.Module] = {}
    for index in indices:
        torch.manual_seed(index)
        layers[index] = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Conv1d(7, 3, 2))
    return layers


def set_gradients(layers: Mapping[int, nn.Module], step: int) -> None:
    """Each layer's are a function of the step and its index."""
    for index, layer in layers.items():
        torch.manual_seed(1000 * (step + 1) + index)
        for parameter in layer.parameters():
            parameter.grad = torch.randn_like(parameter)


def run(optimizer: StageOptimizer, layers: Mapping[int, nn.Module], steps: range) -> None:
    for step in steps:
        set_gradients(layers, step)
        optimizer.step(RATES[step])


def equal(one: Mapping[int, nn.Module], other: Mapping[int, nn.Module]) -> bool:
    return all(
        torch.equal(parameter, other[index].get_parameter(name))
        for index, layer in one.items()
        for name, parameter in layer.named_parameters()
    )


def copy_of(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def test_adamw_is_that_of_torch() -> None:
    ours, theirs = stage(0, 1), stage(0, 1)
    parameters = [parameter for layer in theirs.values() for parameter in layer.parameters()]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.3},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, betas=(0.8, 0.95))
    run(StageOptimizer(ADAMW, ours), ours, range(4))
    for step in range(4):
        set_gradients(theirs, step)
        for group in reference.param_groups:
            group["lr"] = RATES[step]
        reference.step()
    assert equal(ours, theirs)


@pytest.mark.parametrize("settings", [SGD, PLAIN_SGD], ids=["with momentum", "without momentum"])
def test_sgd_is_that_of_torch_with_decoupled_decay(settings: Optimizer) -> None:
    ours, theirs = stage(0, 1), stage(0, 1)
    parameters = [parameter for layer in theirs.values() for parameter in layer.parameters()]
    reference = torch.optim.SGD(parameters, momentum=float(settings.momentum))
    run(StageOptimizer(settings, ours), ours, range(4))
    for step in range(4):
        set_gradients(theirs, step)
        with torch.no_grad():
            for parameter in parameters:
                if parameter.dim() > 1:
                    parameter.mul_(1 - RATES[step] * 0.3)
        reference.param_groups[0]["lr"] = RATES[step]
        reference.step()
    assert equal(ours, theirs)


@ALL
def test_only_matrices_decay(settings: Optimizer) -> None:
    layers = {0: nn.Linear(3, 2)}
    before = {name: parameter.clone() for name, parameter in layers[0].named_parameters()}
    for parameter in layers[0].parameters():
        parameter.grad = torch.zeros_like(parameter)
    StageOptimizer(settings, layers).step(0.5)
    assert torch.equal(layers[0].weight, before["weight"] * (1 - 0.5 * 0.3))
    assert torch.equal(layers[0].bias, before["bias"])


@ALL
def test_the_bits_do_not_depend_on_the_split_into_stages(settings: Optimizer) -> None:
    together, first, second = stage(0, 1, 2), stage(0), stage(1, 2)
    for layers in (together, first, second):
        run(StageOptimizer(settings, layers), layers, range(4))
    assert equal(together, first | second)


@ALL
def test_only_owned_parameters_change_and_the_copies_together_change_all(settings: Optimizer) -> None:
    def by_first(_index: int, name: str) -> bool:
        return name.endswith("weight")

    def by_second(index: int, name: str) -> bool:
        return not by_first(index, name)

    alone, first, second, untouched = stage(0, 1), stage(0, 1), stage(0, 1), stage(0, 1)
    whole = StageOptimizer(settings, alone)
    shares = [StageOptimizer(settings, first, by_first), StageOptimizer(settings, second, by_second)]
    run(whole, alone, range(4))
    run(shares[0], first, range(4))
    run(shares[1], second, range(4))
    for index, layer in alone.items():
        for name, parameter in layer.named_parameters():
            owner, other = (first, second) if by_first(index, name) else (second, first)
            assert torch.equal(owner[index].get_parameter(name), parameter)
            assert torch.equal(other[index].get_parameter(name), untouched[index].get_parameter(name))
        states = [share.layer_state(index) for share in shares]
        assert not states[0].keys() & states[1].keys()
        union = states[0] | states[1]
        assert union.keys() == whole.layer_state(index).keys()
        assert all(torch.equal(union[key], tensor) for key, tensor in whole.layer_state(index).items())


@ALL
def test_a_restored_stage_takes_the_same_next_steps(settings: Optimizer) -> None:
    original = stage(0, 1)
    optimizer = StageOptimizer(settings, original)
    run(optimizer, original, range(2))
    states = {index: copy_of(optimizer.layer_state(index)) for index in original}
    run(optimizer, original, range(2, 4))

    restored = stage(0, 1)
    other = StageOptimizer(settings, restored)
    run(other, restored, range(3))
    for index, state in states.items():
        assert {name: tuple(tensor.shape) for name, tensor in state.items()} == other.layer_shapes(index)
        other.load_layer_state(index, state, updates=2)
    run(other, restored, range(2, 4))
    assert other.updates == 4
    assert equal(original, restored)
    assert all(
        torch.equal(tensor, other.layer_state(index)[name])
        for index in original
        for name, tensor in optimizer.layer_state(index).items()
    )


@ALL
def test_the_state_before_the_first_step_has_the_shapes_of_all_others(settings: Optimizer) -> None:
    optimizer = StageOptimizer(settings, stage(3))
    state = optimizer.layer_state(3)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == optimizer.layer_shapes(3)
    moments = {"AdamW": {"exp_avg", "exp_avg_sq"}, "SGD": {"momentum"} if float(settings.momentum) else set()}
    assert {name.split(".")[0] for name in state} == {"weight"} | moments[settings.name]


def test_the_bias_correction_counts_updates_and_not_steps() -> None:
    """Two updates in a job that skipped a step: a count restored as three would correct for another bias."""
    layers = stage(0)
    optimizer = StageOptimizer(ADAMW, layers)
    run(optimizer, layers, range(2))
    state = copy_of(optimizer.layer_state(0))
    run(optimizer, layers, range(2, 3))
    by_updates, by_steps = stage(0), stage(0)
    for restored, count in ((by_updates, 2), (by_steps, 3)):
        other = StageOptimizer(ADAMW, restored)
        other.load_layer_state(0, state, count)
        run(other, restored, range(2, 3))
    assert equal(layers, by_updates)
    assert not equal(layers, by_steps)


@ALL
def test_a_parameter_without_a_gradient_is_left_alone_but_its_updates_are_counted(settings: Optimizer) -> None:
    layers = stage(0)
    optimizer = StageOptimizer(settings, layers)
    unused = layers[0].get_parameter("0.weight")
    before = unused.detach().clone()
    set_gradients(layers, 0)
    unused.grad = None
    optimizer.step(RATES[0])
    assert torch.equal(unused, before)
    state = copy_of(optimizer.layer_state(0))

    restored = stage(0)
    other = StageOptimizer(settings, restored)
    other.load_layer_state(0, state, optimizer.updates)
    run(optimizer, layers, range(1, 3))
    run(other, restored, range(1, 3))
    assert not torch.equal(unused, before)
    assert equal(layers, restored)


@ALL
def test_a_frozen_parameter_keeps_its_weight_and_has_no_moments(settings: Optimizer) -> None:
    layers = stage(0)
    frozen = layers[0].get_parameter("0.weight").requires_grad_(False)
    before = frozen.clone()
    optimizer = StageOptimizer(settings, layers)
    set_gradients({0: nn.ModuleList([layers[0][1], layers[0][2]])}, 0)
    optimizer.step(0.1)
    assert torch.equal(frozen, before)
    assert [key for key in optimizer.layer_state(0) if key.endswith(".0.weight")] == ["weight.0.weight"]
    assert optimizer.layer_state(0).keys() == optimizer.layer_shapes(0).keys()

    restored = stage(0)
    restored[0].get_parameter("0.weight").requires_grad_(False).zero_()
    StageOptimizer(settings, restored).load_layer_state(0, optimizer.layer_state(0), 1)
    assert equal(layers, restored)


@ALL
def test_a_stage_that_owns_nothing_counts_its_updates(settings: Optimizer) -> None:
    layers = stage(0)
    optimizer = StageOptimizer(settings, layers, lambda _index, _name: False)
    run(optimizer, layers, range(2))
    assert equal(layers, stage(0))
    assert optimizer.layer_state(0) == {}
    assert optimizer.updates == 2


def test_gradients_are_freed() -> None:
    layers = stage(0)
    set_gradients(layers, 0)
    StageOptimizer(ADAMW, layers, lambda _index, name: name.endswith("bias")).zero_grad()
    assert all(parameter.grad is None for parameter in layers[0].parameters())


def test_weights_of_another_type_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"spec.model: .*weight of layer 4 is torch.float16; allowed: torch.f"):
        StageOptimizer(ADAMW, {4: nn.Linear(3, 2).half()})


def test_a_frozen_parameter_may_have_another_type() -> None:
    layers = {4: nn.Linear(3, 2).half().requires_grad_(False)}
    StageOptimizer(ADAMW, layers).step(0.1)


def gradient_of(value: float) -> nn.Linear:
    linear = nn.Linear(3, 2)
    for parameter in linear.parameters():
        parameter.grad = torch.full_like(parameter, value)
    return linear


def norm_of(layers: Mapping[int, nn.Module]) -> float:
    return total_norm([sum(values) for values in squared_gradient_norms(layers).values()])


def test_the_norm_is_that_of_all_gradients() -> None:
    assert norm_of({0: gradient_of(2.0), 1: gradient_of(1.0)}) == math.sqrt(8 * 4 + 8 * 1)


def test_norms_are_in_float64_and_in_the_order_of_the_parameters() -> None:
    layers = stage(2, 5)
    set_gradients(layers, 0)
    assert squared_gradient_norms(layers) == {
        index: [p.grad.double().norm().item() ** 2 for p in layer.parameters()] for index, layer in layers.items()
    }


def test_what_has_no_gradient_or_is_counted_elsewhere_is_zero() -> None:
    layers = {2: gradient_of(1.0), 5: gradient_of(1.0)}
    layers[2].bias.grad = None
    assert squared_gradient_norms(layers, without={(5, "weight")})[2][1] == 0
    assert squared_gradient_norms(layers, without={(5, "weight")})[5][0] == 0
    assert squared_gradient_norms({2: nn.Linear(3, 2)}) == {2: [0, 0]}


def test_layer_norms_have_the_same_bits_however_the_parameters_are_spread_over_the_ranks() -> None:
    layers = stage(0, 1, 2)
    set_gradients(layers, 0)
    norms = squared_gradient_norms(layers)
    expected = [sum(values) for values in norms.values()]
    slots = NormSlots(parameter_counts(layers, 3).tolist())
    for ranks in (1, 2, 3, 5):
        total = torch.zeros(slots.size, dtype=torch.float64)
        for rank in range(ranks):
            vector = torch.zeros(slots.size, dtype=torch.float64)
            mine = {
                index: [value if place % ranks == rank else 0.0 for place, value in enumerate(values)]
                for index, values in norms.items()
            }
            slots.fill(vector, mine)
            total += vector
        assert slots.per_layer(total.tolist()) == expected


def test_stages_together_know_how_many_parameters_each_layer_has() -> None:
    layers = stage(0, 2) | {1: nn.Linear(2, 2, bias=False)}
    first, second = {0: layers[0], 1: layers[1]}, {2: layers[2]}
    assert (parameter_counts(first, 3) + parameter_counts(second, 3)).tolist() == [6, 1, 6]


def test_clipping_scales_to_the_limit_and_leaves_smaller_gradients_alone() -> None:
    layers = {0: gradient_of(2.0)}
    clip(layers.values(), norm_of(layers), 100.0)
    clip(layers.values(), norm_of(layers), 0.0)
    assert torch.equal(layers[0].bias.grad, torch.full((2,), 2.0))
    clip(layers.values(), norm_of(layers), 1.0)
    assert math.isclose(norm_of(layers), 1.0, rel_tol=1e-6)


def test_dividing_by_a_loss_scale_loses_no_bits() -> None:
    layers, scaled = stage(0), stage(0)
    set_gradients(layers, 0)
    set_gradients(scaled, 0)
    scale_gradients(scaled.values(), 65536.0)
    scale_gradients(scaled.values(), 1 / 65536.0)
    assert all(
        torch.equal(parameter.grad, scaled[0].get_parameter(name).grad)
        for name, parameter in layers[0].named_parameters()
    )
