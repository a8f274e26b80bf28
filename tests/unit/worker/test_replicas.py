"""Data-parallel copies of a stage, each a process of its own, against one process that does it all."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import distributed, nn

from pipelinejob_worker.pipeline.replicas import Replicas, owners
from pipelinejob_worker.protocol import Optimizer
from pipelinejob_worker.train.optimizer import (
    NormSlots,
    StageOptimizer,
    clip,
    parameter_counts,
    squared_gradient_norms,
    total_norm,
)
from tests.unit.worker.ranks import on_ranks

CLIP_NORM = 0.5
RATE = 0.01

Weights = dict[str, Any]
"""Parameter to nested lists: they cross from process to process."""


def build() -> dict[int, nn.Module]:
    """A stage with the layers 3 to 6: matrices, vectors, a scalar, one without parameters, one frozen."""
    torch.manual_seed(1)
    first = nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9))
    first.register_parameter("scale", nn.Parameter(torch.ones(())))
    last = nn.Linear(9, 4)
    last.bias.requires_grad_(False)
    return {3: first, 4: nn.Linear(9, 9), 5: nn.GELU(), 6: last}


def gradients(step: int, copy: int) -> dict[tuple[int, str], torch.Tensor | None]:
    """What a copy's backward passes give. The weight of layer 4 never has any, its bias not on every copy."""
    generator = torch.Generator().manual_seed(1 + 100 * step + copy)
    made: dict[tuple[int, str], torch.Tensor | None] = {}
    for index, layer in build().items():
        for name, parameter in layer.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            unused = (index, name) == (4, "weight") or ((index, name) == (4, "bias") and (step + copy) % 3 == 0)
            made[index, name] = None if unused or not parameter.requires_grad else values
    return made


def set_gradients(layers: Mapping[int, nn.Module], step: int, copy: int) -> None:
    for (index, name), gradient in gradients(step, copy).items():
        layers[index].get_parameter(name).grad = gradient


def weights(layers: Mapping[int, nn.Module]) -> Weights:
    return {
        f"{index}.{name}": parameter.tolist()
        for index, layer in layers.items()
        for name, parameter in layer.named_parameters()
    }


def reference(settings: Optimizer, copies_of_step: Sequence[int]) -> tuple[Weights, list[float]]:
    """One process: sums the copies' gradients in their order, clips, updates. Returns weights and norms."""
    layers = build()
    optimizer = StageOptimizer(settings, layers)
    norms = []
    for step, copies in enumerate(copies_of_step):
        optimizer.zero_grad()
        for copy in range(copies):
            for (index, name), gradient in gradients(step, copy).items():
                parameter = layers[index].get_parameter(name)
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        norms.append(total_norm([sum(values) for values in squared_gradient_norms(layers).values()]))
        clip(layers.values(), norms[-1], CLIP_NORM)
        optimizer.step(RATE)
    return weights(layers), norms


def train(
    settings: Optimizer, steps: Sequence[int], saved: Mapping[int, Mapping[str, Any]] | None = None
) -> tuple[Weights, list[float], dict[int, dict[str, Any]]]:
    """This copy's part of the steps; ``saved``: whole layer states to begin with. Returns its own states, too."""
    layers, world = build(), distributed.group.WORLD
    assert world is not None
    replicas = Replicas(layers, world)
    optimizer = StageOptimizer(settings, layers, replicas.owned)
    for index, state in (saved or {}).items():
        optimizer.load_layer_state(index, {key: torch.tensor(value) for key, value in state.items()}, steps[0])
    slots = NormSlots(parameter_counts(layers, total=7).tolist())
    norms = []
    for step in steps:
        optimizer.zero_grad()
        set_gradients(layers, step, world.rank())
        for index in reversed(layers):
            replicas.start(index)
        replicas.finish()
        vector = torch.zeros(slots.size, dtype=torch.float64)
        slots.fill(vector, squared_gradient_norms(layers))
        distributed.all_reduce(vector)
        norms.append(total_norm(slots.per_layer(vector.tolist())))
        clip(layers.values(), norms[-1], CLIP_NORM)
        optimizer.step(RATE)
        replicas.publish()
    states = {index: {key: tensor.tolist() for key, tensor in optimizer.layer_state(index).items()} for index in layers}
    return weights(layers), norms, states


ADAMW = Optimizer()
SGD = Optimizer(name="SGD")


@pytest.mark.parametrize(
    ("copies", "settings"), [(2, ADAMW), (3, ADAMW), (3, SGD)], ids=["2 AdamW", "3 AdamW", "3 SGD"]
)
def test_copies_have_the_bits_of_one_process_that_sums_their_gradients_in_order(
    copies: int, settings: Optimizer
) -> None:
    expected, norms = reference(settings, [copies] * 4)
    for final, seen, _ in on_ranks(copies, train, settings, range(4)):
        assert final == expected
        assert seen == norms
    assert min(norms) > CLIP_NORM


def test_the_copies_states_together_resume_another_number_of_copies() -> None:
    parts = [states for _, _, states in on_ranks(2, train, ADAMW, range(2))]
    for index in parts[0]:
        assert not parts[0][index].keys() & parts[1][index].keys()
    whole = {index: parts[0][index] | parts[1][index] for index in parts[0]}
    expected, norms = reference(ADAMW, [2, 2, 3, 3])
    for final, seen, _ in on_ranks(3, train, ADAMW, range(2, 4), whole):
        assert final == expected
        assert seen == norms[2:]


def sums_and_reverse() -> tuple[Weights, Weights]:
    """What finish leaves on this copy, and what it would be if the copies were summed from the last to the first."""
    layers, world = build(), distributed.group.WORLD
    assert world is not None
    replicas = Replicas(layers, world)
    set_gradients(layers, 0, world.rank())
    for index in layers:
        replicas.start(index)
    replicas.finish()
    present = {
        (index, name): parameter.grad
        for index, layer in layers.items()
        for name, parameter in layer.named_parameters()
        if parameter.grad is not None
    }
    assert all(replicas.owned(index, name) for index, name in present)
    reversed_sums = {}
    for key in present:
        total = torch.zeros(())
        for copy in reversed(range(world.size())):
            gradient = gradients(0, copy)[key]
            total = total if gradient is None else total + gradient
        reversed_sums[key] = total
    return _named(present), _named(reversed_sums)


def _named(tensors: Mapping[tuple[int, str], torch.Tensor]) -> Weights:
    return {f"{index}.{name}": tensor.tolist() for (index, name), tensor in tensors.items()}


def test_each_sum_is_at_its_owner_alone_and_in_the_order_of_the_copies() -> None:
    seen = on_ranks(3, sums_and_reverse)
    names = [name for ours, _ in seen for name in ours]
    trained = {f"{index}.{name}" for (index, name), gradient in gradients(0, 1).items() if gradient is not None}
    assert sorted(names) == sorted(trained)
    assert any(ours != other_order for ours, other_order in seen)


def begin_without_the_other() -> list[bool]:
    """Copy 0 starts all transfers before copy 1 starts any; returns whether the sums were right in the end."""
    layers, world = build(), distributed.group.WORLD
    assert world is not None
    store = distributed.distributed_c10d._get_default_store()
    replicas = Replicas(layers, world)
    set_gradients(layers, 0, world.rank())
    if world.rank() == 1:
        store.get("copy 0 has started all")
    for index in (6, 5, 3, 4):
        replicas.start(index)
        taken = [parameter.grad is None for parameter in layers[index].parameters()]
        assert all(taken), "gradients that are on their way must not be added to"
    if world.rank() == 0:
        store.set("copy 0 has started all", "")
    replicas.finish()
    one, other = gradients(0, 0), gradients(0, 1)
    return [
        torch.equal(parameter.grad, one[index, name] + other[index, name])
        for index, layer in layers.items()
        for name, parameter in layer.named_parameters()
        if parameter.grad is not None and one[index, name] is not None
    ]


def test_a_start_waits_for_no_other_copy_so_transfers_go_on_beside_the_backward_pass() -> None:
    right = on_ranks(2, begin_without_the_other)
    assert all(len(seen) > 0 for seen in right)
    assert all(all(seen) for seen in right)


def forget_a_layer() -> str:
    layers = build()
    replicas = Replicas(layers, distributed.group.WORLD)
    set_gradients(layers, 0, 0)
    for index in list(layers)[1:]:
        replicas.start(index)
    try:
        replicas.finish()
    except AssertionError as error:
        return str(error)
    return "no error"


def test_a_layer_that_was_not_sent_is_an_error_and_not_a_wrong_sum() -> None:
    assert on_ranks(1, forget_a_layer) == ["a layer's gradients were not sent"]


def test_a_single_copy_owns_all_and_keeps_its_gradients() -> None:
    layers = build()
    replicas = Replicas(layers, None)
    set_gradients(layers, 0, 1)
    for index in layers:
        replicas.start(index)
    replicas.finish()
    replicas.publish()
    for (index, name), gradient in gradients(0, 1).items():
        assert replicas.owned(index, name)
        assert layers[index].get_parameter(name).grad is None or torch.equal(
            layers[index].get_parameter(name).grad, gradient
        )
    assert weights(layers) == weights(build())


def loads(sizes: Mapping[tuple[int, str], int], owner: Mapping[tuple[int, str], int], copies: int) -> list[int]:
    return [sum(size for key, size in sizes.items() if owner[key] == copy) for copy in range(copies)]


def test_owners_have_about_equal_shares() -> None:
    sizes = {
        (index, name): size for index in range(12) for name, size in (("a", 4096), ("b", 1024), ("c", 64), ("d", 1))
    }
    for copies in (1, 2, 3, 5):
        shares = loads(sizes, owners(sizes, copies), copies)
        assert sum(shares) == sum(sizes.values())
        assert max(shares) <= 4 / 3 * math.ceil(sum(sizes.values()) / copies)


def test_the_largest_parameters_are_given_away_first() -> None:
    sizes = {(0, "norm"): 1, (0, "bias"): 1, (1, "matrix"): 2}
    assert loads(sizes, owners(sizes, 2), 2) == [2, 2]


def test_owners_depend_on_names_and_sizes_alone() -> None:
    sizes = {(index, name): 7 for index in range(5) for name in "abc"}
    assert owners(dict(reversed(sizes.items())), 4) == owners(sizes, 4)


def test_pinned_parameters_belong_to_copy_0_and_the_others_make_up_for_it() -> None:
    sizes = {(0, "embedding"): 100, (1, "a"): 50, (1, "b"): 50, (2, "c"): 100, (3, "head"): 100}
    owner = owners(sizes, 2, pinned={(0, "embedding"), (3, "head")})
    assert owner[0, "embedding"] == owner[3, "head"] == 0
    assert loads(sizes, owner, 2) == [200, 200]
