"""The profile measures what a layer does, on every stage, and the split it leads to takes the time it promised."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.models import LayeredModel, ListModel, model_of
from pipelinejob_worker.models.layered import Cost
from pipelinejob_worker.pipeline.group import Group
from pipelinejob_worker.pipeline.partition import LayerCost, balanced, chunk_times
from pipelinejob_worker.pipeline.profile import Profile, layer_kinds, measure_layer, measured_costs, stage_speeds
from pipelinejob_worker.pipeline.stage import RandomState, StageChunk, prepare_layers
from pipelinejob_worker.protocol import Data, Model, Preset, Train
from pipelinejob_worker.protocol.train import Schedule
from tests.unit.worker import forked
from tests.unit.worker.ranks import on_ranks

CPU = torch.device("cpu")
MILLISECONDS = [(20, 20, 20), (40, 50, 30), (40, 50, 30), (80, 100, 60), (25, 35, 40), (130, 130, 130)]
"""How long each layer of ``Sleepers`` sleeps: forward, for the input's gradient, for the weight's."""


def within_a_tenth(seconds: float | list[float]) -> Any:
    """With a real clock."""
    return pytest.approx(seconds, rel=0.1)


def exactly(seconds: float) -> Any:
    """In virtual time."""
    return pytest.approx(seconds, rel=1e-9)


def virtual_time() -> None:
    """From here on, in this process, sleeping takes no time and nothing else takes any on the clock."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    time.sleep = sleep
    time.perf_counter = lambda: now[0]


class Sleep(torch.autograd.Function):
    """Hands on what it gets, after a sleep in either direction."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, forward: float, backward: float) -> torch.Tensor:
        ctx.backward_seconds = backward
        time.sleep(forward)
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        time.sleep(ctx.backward_seconds)
        return gradient, None, None


class Sleeper(nn.Module):
    """Multiplies by a weight that sleeps on its own, so that both parts of the backward pass have their time."""

    def __init__(self, seconds: tuple[float, ...], *, embeds: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.seconds = seconds
        self.embeds = embeds

    def forward(self, hidden: torch.Tensor, _positions: torch.Tensor) -> torch.Tensor:
        forward, for_input, for_weight = self.seconds
        if self.embeds:  # token ids have no gradient: only the weight sleeps
            weight = Sleep.apply(self.weight, forward, for_input + for_weight)
            return hidden[..., None].float() * weight
        return Sleep.apply(hidden, forward, for_input) * Sleep.apply(self.weight, 0.0, for_weight)


class Sleepers(ListModel):
    """A layer for each entry of ``MILLISECONDS``; ``slowness`` multiplies all of them."""

    names = tuple(f"sleeper.{index}" for index in range(len(MILLISECONDS)))
    costs = tuple(Cost(flops=float(sum(milliseconds)), parameters=4) for milliseconds in MILLISECONDS)
    context, vocabulary, width = 3, 4, 4
    fingerprint = "sleepers"

    def __init__(self, slowness: float = 1.0) -> None:
        self._slowness = slowness

    def layer(self, index: int, seed: int) -> nn.Module:
        return Sleeper(tuple(self._slowness * part / 1000 for part in MILLISECONDS[index]), embeds=index == 0)


def training(schedule: str = "1F1B", chunks: int = 1, **fields: Any) -> Train:
    return Train(
        data=Data(files=["*"]),
        steps=1,
        global_batch_size=4,
        microbatches=4,
        schedule=Schedule(name=schedule, chunks_per_stage=chunks),
        **fields,
    )


class Shrinking(Sleepers):
    """Its inner layers pass on less than they received."""

    def layer(self, index: int, seed: int) -> nn.Module:
        layer = super().layer(index, seed)
        whole = layer.forward
        layer.forward = lambda hidden, positions: whole(hidden, positions)[:, 1:]
        return layer


def gpt(**fields: Any) -> LayeredModel:
    return model_of(Model(preset=Preset(name="gpt", layers=6, width=64, heads=4, context=32, **fields)))


def cost_of(model: LayeredModel, index: int, train: Train) -> LayerCost:
    torch.set_num_threads(1)
    return measure_layer(model, index, 2, train, CPU)


def virtual_cost_of(index: int, train: Train) -> LayerCost:
    virtual_time()
    return cost_of(Sleepers(), index, train)


def test_the_clock_measures_each_part_within_a_tenth() -> None:
    cost = forked.call(cost_of, Sleepers(), 3, training("ZBVZeroBubble", 2))
    assert cost.forward_seconds == within_a_tenth(0.080)
    assert cost.input_seconds == within_a_tenth(0.100)
    assert cost.weight_seconds == within_a_tenth(0.060)


def test_a_layer_that_passes_on_another_shape_is_refused_by_its_name() -> None:
    with pytest.raises(ConfigurationError, match=r"^spec\.model: layer sleeper\.1 passes on .* \[2, 2, 4\]"):
        cost_of(Shrinking(slowness=0.0), 1, training())


@pytest.mark.parametrize("index", [1, 5], ids=["inside", "with the loss"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "computed again"])
def test_the_parts_of_a_split_backward_are_measured_apart(index: int, checkpointed: bool) -> None:
    """What is computed again is so for each part."""
    train = training("ZBVZeroBubble", 2, activation_checkpointing=checkpointed)
    cost = forked.call(virtual_cost_of, index, train)
    forward, for_input, for_weight = (part / 1000 for part in MILLISECONDS[index])
    again = forward if checkpointed else 0.0
    assert cost.forward_seconds == exactly(forward)
    assert cost.input_seconds == exactly(for_input + again)
    assert cost.weight_seconds == exactly(for_weight + again)


def test_a_whole_backward_is_measured_as_one() -> None:
    cost = forked.call(virtual_cost_of, 3, training())
    assert (cost.forward_seconds, cost.input_seconds, cost.weight_seconds) == (exactly(0.080), exactly(0.160), 0.0)


def test_the_backward_of_the_first_layer_is_never_split() -> None:
    """Nobody waits for the gradient of tokens."""
    cost = forked.call(virtual_cost_of, 0, training("ZBVZeroBubble", 2))
    assert (cost.forward_seconds, cost.input_seconds, cost.weight_seconds) == (exactly(0.020), exactly(0.040), 0.0)


def test_memory_is_that_of_the_weights_and_of_what_the_backward_needs() -> None:
    """A microbatch has 2 samples of 32 tokens, in float32."""
    hidden = 4 * 2 * 32 * 64
    block = forked.call(cost_of, gpt(), 1, training())
    assert block.parameter_bytes == 4 * sum(weight.numel() for weight in gpt().build(range(1, 2), 0).parameters())
    # Input, both norms, query-key-value, attention, the sum, expansion and its gelu, and less for statistics.
    assert 16 * hidden <= block.activation_bytes < 17 * hidden
    assert forked.call(cost_of, gpt(), 1, training(activation_checkpointing=True)).activation_bytes == hidden


def test_half_precision_is_measured_in_half_precision() -> None:
    full, half = (forked.call(cost_of, gpt(), 1, training(precision=name)) for name in ("Float32", "BFloat16"))
    assert half.parameter_bytes == full.parameter_bytes
    assert half.activation_bytes < full.activation_bytes


def test_layers_that_are_alike_are_measured_once() -> None:
    assert layer_kinds(gpt()) == [0, 1, 1, 1, 1, 1, 1, 7]
    assert layer_kinds(Sleepers()) == [0, 1, 1, 3, 4, 5]


def profile(directory: Path | None) -> Profile:
    return measured_costs(Sleepers(), 1, training(), Group(0, 1, CPU), directory)


def virtual_profile(
    slowness: dict[int, float], directory: Path | None, schedule: str = "GPipe", pipelines: int = 1
) -> Profile:
    """On a rank: rank n is ``slowness[n]`` times slower."""
    virtual_time()
    rank = torch.distributed.get_rank()
    stages = torch.distributed.get_world_size() // pipelines
    group = Group(rank % stages, stages, CPU, rank // stages, pipelines)
    return measured_costs(Sleepers(slowness.get(rank, 1.0)), 1, training(schedule), group, directory)


def check_costs(costs: list[LayerCost], slowness: float = 1.0) -> None:
    for cost, milliseconds in zip(costs, MILLISECONDS, strict=True):
        assert cost.seconds == exactly(slowness * sum(milliseconds) / 1000)


@pytest.mark.parametrize("schedule", ["GPipe", "InterleavedZeroBubble"])
def test_all_stages_agree_on_a_profile(schedule: str) -> None:
    first, *others = on_ranks(2, virtual_profile, {1: 1.1}, None, schedule)
    assert others == [first]
    assert first.speeds == [1.0, 1.0], "a tenth cannot be told from noise"
    check_costs(first.costs)


@pytest.mark.parametrize(
    ("runs", "speeds"),
    [
        ([[2.0, 2.1, 2.0], [4.0, 4.1, 4.2]], [1.0, 0.5]),
        ([[2.0, 2.0, 2.0], [2.2, 2.2, 2.2]], [1.0, 1.0]),
        ([[2.0, 3.1, 4.0], [3.0, 3.0, 5.0]], [1.0, 1.0]),
        ([[2.0, 2.0, 9.0], [4.0, 4.0, 4.0]], [1.0, 0.5]),
    ],
    ids=["slow", "hardly slower", "noisy", "one run disturbed"],
)
def test_a_stage_is_slow_only_beyond_noise(runs: list[list[float]], speeds: list[float]) -> None:
    assert stage_speeds(runs, 2) == speeds


def test_a_slow_stage_is_found_and_the_costs_are_those_of_the_fastest() -> None:
    first, *others = on_ranks(3, virtual_profile, {0: 1.5, 1: 3.0}, None)
    assert others == [first, first]
    assert first.speeds == [exactly(1 / 1.5), exactly(1 / 3), 1.0]
    check_costs(first.costs)


def test_a_stage_is_as_slow_as_its_slowest_copy() -> None:
    """Ranks 0 and 1 are the stages of one pipeline, 2 and 3 those of the other."""
    assert on_ranks(4, virtual_profile, {3: 2.0}, None, "GPipe", 2)[0].speeds == [1.0, exactly(0.5)]


def passes_of_a_stage(layers: range) -> float:
    """Seconds of a stage's passes for one microbatch, the shortest of five."""
    torch.set_num_threads(1)
    model, train, state = Sleepers(), training(), RandomState(0)
    module = model.build(layers, 0).train()
    prepare_layers(module, train, state)
    last = layers.stop == len(model.names)
    chunk = StageChunk(module, layers.start, train=train, state=state, loss=model.loss if last else None)
    received = torch.zeros(1, 3, dtype=torch.int64) if layers.start == 0 else torch.zeros(1, 3, 4)
    tokens, gradient = torch.zeros(1, 3, dtype=torch.int64), None if last else torch.ones(1, 3, 4)
    taken = []
    for _ in range(5):
        started = time.perf_counter()
        chunk.forward(0, received, tokens, tokens)
        chunk.backward(0, gradient)
        taken.append(time.perf_counter() - started)
    return min(taken)


def test_the_stages_of_the_balanced_split_take_the_time_that_was_promised() -> None:
    """With a real clock, from the profile to the passes of each stage."""
    (measured,) = on_ranks(1, profile, None)
    for cost, milliseconds in zip(measured.costs, MILLISECONDS, strict=True):
        assert cost.seconds == within_a_tenth(sum(milliseconds) / 1000)
    stages, speeds = range(3), [1.0] * 3
    split = balanced(measured.costs, stages, speeds)
    assert split.chunks == [range(3), range(3, 5), range(5, 6)]
    promised = [sum(times) for times in chunk_times(split.chunks, measured.costs, speeds, stages)]
    taken = [forked.call(passes_of_a_stage, layers) for layers in split.chunks]
    assert taken == within_a_tenth(promised)
    assert max(taken) == within_a_tenth(split.bottleneck_seconds)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    """Two stages share a file. When all sleep longer, only the dearest layer shows it: it is measured at each start."""
    cache = tmp_path / "profiles"
    first, _ = on_ranks(2, virtual_profile, {}, cache)
    written = files(cache)
    assert len(written) == 1
    again, other = on_ranks(2, virtual_profile, {0: 3.0, 1: 3.0}, cache)
    assert again == other
    assert files(cache) == written
    check_costs(first.costs)
    check_costs(again.costs, slowness=3.0)


def test_the_speed_of_a_stage_is_never_taken_from_the_cache(tmp_path: Path) -> None:
    on_ranks(2, virtual_profile, {}, tmp_path)
    assert on_ranks(2, virtual_profile, {1: 2.0}, tmp_path)[0].speeds == [1.0, exactly(0.5)]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: content.replace(b'"sleepers"', b'"another"'),
        lambda content: content.replace(b'"forward_seconds":', b'"forward_seconds":-'),
        lambda content: content.replace(b'"weight_seconds":0.0', b'"weight_seconds":NaN'),
        lambda content: content + b" " * (1 << 20),
    ],
    ids=["torn", "empty", "of another model", "negative", "not a number", "too large"],
)
def test_a_file_that_cannot_be_right_is_measured_again_and_rewritten(damage: Any, tmp_path: Path) -> None:
    on_ranks(1, virtual_profile, {}, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    damaged = damage(whole)
    assert damaged != whole
    path.write_bytes(damaged)
    (after,) = on_ranks(1, virtual_profile, {}, tmp_path)
    check_costs(after.costs)
    assert files(tmp_path) == {path.name: whole}


def test_a_cache_that_cannot_be_written_costs_only_the_measurement(tmp_path: Path) -> None:
    occupied = tmp_path / "file"
    occupied.touch()
    (after,) = on_ranks(1, virtual_profile, {}, occupied)
    check_costs(after.costs)


def virtual_profiles(different: list[tuple[Train, int]], directory: Path) -> list[int]:
    """How many files there are after each."""
    virtual_time()
    counts = []
    for train, samples in different:
        measured_costs(Sleepers(), samples, train, Group(0, 1, CPU), directory)
        counts.append(len(files(directory)))
    return counts


def test_every_circumstance_has_its_own_file(tmp_path: Path) -> None:
    different = [
        (training(), 1),
        (training(), 2),
        (training(precision="BFloat16"), 1),
        (training(activation_checkpointing=True), 1),
        (training("ZBVZeroBubble", 2), 1),
        (training("GPipe"), 1),  # does not split the backward, like the first
    ]
    assert on_ranks(1, virtual_profiles, different, tmp_path) == [[1, 2, 3, 4, 5, 5]]
