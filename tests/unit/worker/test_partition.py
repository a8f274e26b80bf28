"""The balanced split is the best one there is; Even and Manual are what they say."""

import math
import time
from collections.abc import Sequence
from itertools import combinations, pairwise
from random import Random

import pytest

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.models import model_of
from pipelinejob_worker.pipeline.partition import (
    LayerCost,
    Memory,
    PassSeconds,
    Split,
    balanced,
    chunk_times,
    describe,
    even,
    manual,
    static_costs,
)
from pipelinejob_worker.pipeline.schedule import Action, Pass, build_schedule
from pipelinejob_worker.pipeline.simulation import simulate
from pipelinejob_worker.protocol import Model, Preset
from tests.unit.docs.pages import DOCS, table

MEBIBYTE = 1 << 20


def layer(seconds: float, parameter_bytes: int = 0, activation_bytes: int = 0) -> LayerCost:
    return LayerCost(seconds, 0.0, 0.0, parameter_bytes, activation_bytes)


def looped(stages: int, chunks_per_stage: int) -> list[int]:
    return list(range(stages)) * chunks_per_stage


def vee(stages: int) -> list[int]:
    return [*range(stages), *reversed(range(stages))]


def stage_sums(of_chunks: Sequence[float], stage_of: Sequence[int]) -> list[float]:
    return [
        sum(amount for amount, at in zip(of_chunks, stage_of, strict=True) if at == stage)
        for stage in range(max(stage_of) + 1)
    ]


def every_split(layers: int, chunks: int) -> list[list[range]]:
    return [
        [range(start, end) for start, end in pairwise((0, *cuts, layers))]
        for cuts in combinations(range(1, layers), chunks - 1)
    ]


def fits(split: list[range], costs: list[LayerCost], stage_of: list[int], memory: Memory | None) -> bool:
    if memory is None:
        return True
    sizes = [
        sum(
            memory.copies * costs[i].parameter_bytes + memory.live_microbatches[at] * costs[i].activation_bytes
            for i in c
        )
        for c, at in zip(split, stage_of, strict=True)
    ]
    return all(size <= limit for size, limit in zip(stage_sums(sizes, stage_of), memory.limits, strict=True))


def slowest(
    split: list[range], costs: list[LayerCost], stage_of: list[int], speeds: list[float]
) -> tuple[float, float]:
    """Time of the slowest stage, and of the slowest chunk."""
    of_chunks = [
        sum(costs[i].seconds for i in chunk) / speeds[stage] for chunk, stage in zip(split, stage_of, strict=True)
    ]
    return max(stage_sums(of_chunks, stage_of)), max(of_chunks)


PLACEMENTS = {
    **{f"looped, {v} chunks": (lambda stages, v=v: looped(stages, v)) for v in (1, 2, 3)},
    "V": vee,
    "V and down again": lambda stages: [*vee(stages), *range(stages)],
}


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
@pytest.mark.parametrize("limited", [False, True], ids=["any memory", "limited memory"])
def test_no_other_split_has_a_faster_slowest_stage_nor_then_a_faster_slowest_chunk(placement, limited: bool) -> None:  # type: ignore[no-untyped-def]
    """Against all splits. Whole seconds and such speeds that quotients are exact, so that ties are ties."""
    feasible = infeasible = 0
    for seed in range(120):
        random = Random(seed)
        stage_of = placement(random.randint(1, 4))
        stages = max(stage_of) + 1
        seconds = random.choice([[0, 1, 1, 1, 2, 3, 10], range(1, 1000)])
        costs = [
            layer(float(random.choice(seconds)), random.randint(0, 9), random.randint(0, 5))
            for _ in range(random.randint(len(stage_of), max(len(stage_of), 11)))
        ]
        speeds = [random.choice([1.0, 1.0, 0.8, 0.5, 0.25]) for _ in range(stages)]
        memory = Memory(
            limits=[random.choice([math.inf, random.randint(40, 50 + 400 // stages)]) for _ in range(stages)],
            live_microbatches=[random.randint(1, 4) for _ in range(stages)],
            copies=4,
        )
        allowed = [
            split
            for split in every_split(len(costs), len(stage_of))
            if fits(split, costs, stage_of, memory if limited else None)
        ]
        if not allowed:
            infeasible += 1
            with pytest.raises(ConfigurationError, match=r"spec\.partition\.memoryLimitMiB: .* stage \d needs"):
                balanced(costs, stage_of, speeds, memory)
            continue
        feasible += 1
        found = balanced(costs, stage_of, speeds, memory if limited else None)
        assert found.chunks in allowed, seed
        best = min(slowest(split, costs, stage_of, speeds) for split in allowed)
        assert slowest(found.chunks, costs, stage_of, speeds) == best, seed
        assert found == Split(found.chunks, best[0], best[0], optimal=True), seed
    assert feasible > 20
    assert infeasible > 2 or not limited


@pytest.mark.parametrize("seed", range(10))
def test_measured_times_are_split_as_well_as_round_ones(seed: int) -> None:
    random = Random(seed)
    costs = [LayerCost(random.random(), random.random(), random.random(), 1, 1) for _ in range(12)]
    stage_of, speeds = random.choice([looped(3, 1), looped(2, 2), vee(3)]), [1.0, 0.83, 1.0]
    found = balanced(costs, stage_of, speeds[: max(stage_of) + 1])
    best = min(slowest(split, costs, stage_of, speeds)[0] for split in every_split(12, len(stage_of)))
    assert found.optimal
    assert found.bottleneck_seconds == pytest.approx(best, rel=1e-7)


def test_of_equal_splits_that_with_the_latest_cuts_is_taken() -> None:
    assert balanced([layer(1.0)] * 5, [0, 1], [1.0, 1.0]).chunks == [range(3), range(3, 5)]
    assert balanced([layer(1.0), *[layer(0.0)] * 3, layer(1.0)], [0, 1], [1.0, 1.0]).chunks == [range(4), range(4, 5)]
    assert balanced([layer(5.0), *[layer(1.0)] * 4], [0, 1, 2], [1.0] * 3).chunks == [
        range(1),
        range(1, 4),
        range(4, 5),
    ]


def test_a_slow_stage_gets_fewer_layers() -> None:
    assert balanced([layer(1.0)] * 10, [0, 1, 2], [1.0, 0.5, 1.0]).chunks == [range(4), range(4, 6), range(6, 10)]


@pytest.mark.parametrize(
    ("layers", "stage_of", "limit_seconds"),
    [
        pytest.param(100, looped(8, 1), 0.5, id="8 stages"),
        pytest.param(64, looped(4, 2), 2.0, id="4 stages, looped"),
        pytest.param(64, vee(4), 2.0, id="4 stages, V"),
    ],
)
@pytest.mark.parametrize("limited", [False, True], ids=["any memory", "limited memory"])
def test_models_of_usual_size_are_split_at_once(
    layers: int, stage_of: list[int], limit_seconds: float, limited: bool
) -> None:
    random, stages = Random(0), max(stage_of) + 1
    costs = [layer(random.random(), 100, 50) for _ in range(layers)]
    memory = Memory([500 * (layers / stages * 1.02 + 1)] * stages, [2] * stages, copies=4) if limited else None
    started = time.process_time()
    found = balanced(costs, stage_of, [1.0] * stages, memory)
    assert time.process_time() - started < limit_seconds
    assert found.optimal


def test_the_largest_pipeline_is_split() -> None:
    assert balanced([layer(1.0)] * 1026, looped(512, 1), [1.0] * 512).bottleneck_seconds == 3.0


def test_a_search_that_is_too_long_ends_with_a_good_split_and_a_bound() -> None:
    random = Random(0)
    costs = [layer(random.random()) for _ in range(200)]
    stage_of = looped(8, 4)
    found = balanced(costs, stage_of, [1.0] * 8, work_limit=10_000_000)
    assert not found.optimal
    assert found == balanced(costs, stage_of, [1.0] * 8, work_limit=10_000_000), "the same on every stage"
    assert sum(cost.seconds for cost in costs) / 8 <= found.lower_bound_seconds < found.bottleneck_seconds
    assert found.bottleneck_seconds < 1.05 * found.lower_bound_seconds


def test_stages_that_do_not_follow_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="do not visit all stages up or down in turn"):
        balanced([layer(1.0)] * 4, [1, 0, 0, 2], [1.0] * 3)


def test_too_little_memory_names_the_stage_that_comes_closest_and_the_cure() -> None:
    """The head alone needs 4 x 10 + 3 x 2 MiB."""
    costs = [*[layer(1.0, MEBIBYTE, MEBIBYTE)] * 4, layer(1.0, 10 * MEBIBYTE, 2 * MEBIBYTE)]
    memory = Memory([40 * MEBIBYTE] * 2, [3, 3], copies=4)
    with pytest.raises(ConfigurationError) as refused:
        balanced(costs, [0, 1], [1.0, 1.0], memory)
    assert str(refused.value) == (
        "spec.partition.memoryLimitMiB: in the split that comes closest, stage 1 needs 46 MiB; allowed: 40 MiB; use "
        "more spec.stages, spec.train.activationCheckpointing, or smaller microbatches by more spec.train.microbatches"
    )
    assert balanced(costs, [0, 1], [1.0, 1.0], Memory([40 * MEBIBYTE, 46 * MEBIBYTE], [3, 3], copies=4)).optimal


@pytest.mark.parametrize(
    ("layers", "chunks", "split"),
    [
        (10, 4, ["0-2", "3-5", "6-7", "8-9"]),
        (8, 4, ["0-1", "2-3", "4-5", "6-7"]),
        (3, 1, ["0-2"]),
        (2, 2, ["0-0", "1-1"]),
    ],
)
def test_even_gives_each_chunk_as_many_layers(layers: int, chunks: int, split: list[str]) -> None:
    assert [describe(chunk) for chunk in even(layers, chunks)] == split


def test_manual_cuts_at_the_boundaries() -> None:
    assert manual([1, 7], 9, 3) == [range(1), range(1, 7), range(7, 9)]
    assert manual([], 9, 1) == [range(9)]


@pytest.mark.parametrize(
    ("boundaries", "message"),
    [
        ([3], r"boundaries: 1 boundaries do not cut the model into 3 chunks .*allowed: 2"),
        ([3, 3], r"boundaries\[1\]: 3 begins no chunk; allowed: more than 3, .*less than the 9 layers"),
        ([5, 3], r"boundaries\[1\]: 3 begins no chunk; allowed: more than 5"),
        ([0, 3], r"boundaries\[0\]: 0 begins no chunk; allowed: more than 0"),
        ([3, 9], r"boundaries\[1\]: 9 begins no chunk; allowed: more than 3, .*less than the 9 layers"),
    ],
)
def test_manual_boundaries_that_cut_nothing_are_refused(boundaries: list[int], message: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"spec\.partition\.{message}"):
        manual(boundaries, 9, 3)


def test_fewer_layers_than_chunks_are_refused_by_every_strategy() -> None:
    for split in (
        lambda: even(3, 4),
        lambda: manual([1, 2, 3], 3, 4),
        lambda: balanced([layer(1.0)] * 3, looped(2, 2), [1.0, 1.0]),
    ):
        with pytest.raises(ConfigurationError, match=r"spec\.stages: 3 layers are too few for 4 chunks.*lower"):
            split()


def test_the_times_of_chunks_are_the_sums_of_their_layers_on_their_stages() -> None:
    costs = [LayerCost(1.0, 2.0, 3.0, 0, 0), LayerCost(10.0, 20.0, 30.0, 0, 0), LayerCost(4.0, 5.0, 6.0, 0, 0)]
    times = chunk_times([range(2), range(2, 3)], costs, [1.0, 0.5], [0, 1])
    assert times == [PassSeconds(11.0, 22.0, 33.0), PassSeconds(8.0, 10.0, 12.0)]


def test_without_a_profile_an_embedding_and_a_head_are_not_counted_as_blocks() -> None:
    preset = Preset(name="gpt", layers=8, width=256, heads=8, context=256)
    costs = static_costs(model_of(Model(preset=preset)), samples=4)
    assert [describe(chunk) for chunk in balanced(costs, looped(4, 1), [1.0] * 4).chunks] == [
        "0-2",
        "3-4",
        "5-6",
        "7-9",
    ]
    assert costs[0].seconds == 0
    assert costs[1].parameter_bytes == 4 * (12 * 256**2 + 13 * 256)
    assert costs[1].activation_bytes == 4 * 4 * 256 * 256


def documented(
    name: str, chunks: list[range], speeds: list[float], costs: list[LayerCost], memory: Memory
) -> list[str]:
    """A row of the table in the documentation."""
    times = chunk_times(chunks, costs, speeds, range(3))

    def seconds(action: Action) -> float:
        passes = times[action.chunk]
        return passes.forward if action.kind == Pass.FORWARD else passes.input + passes.weight

    predicted = simulate(build_schedule("1F1B", 3, 1, 8), seconds)
    mebibytes = [sum(memory.bytes_of(costs[i], stage) for i in chunk) / MEBIBYTE for stage, chunk in enumerate(chunks)]
    return [
        name,
        ", ".join(map(describe, chunks)),
        ", ".join(f"{1000 * sum(passes):.0f}" for passes in times),
        ", ".join(f"{size:.0f}" for size in mebibytes),
        f"{1000 * predicted.seconds:.0f} ms",
        f"{100 * predicted.bubble:.0f} %",
    ]


def test_the_example_of_the_documentation_is_what_comes_out() -> None:
    def cost(milliseconds: float, weights: int, activations: int) -> LayerCost:
        return LayerCost(milliseconds / 3000, milliseconds / 1500, 0.0, weights * MEBIBYTE, activations * MEBIBYTE)

    costs = [cost(1, 4, 1), *[cost(6, 10, 5)] * 4, cost(11, 4, 2)]
    schedule = build_schedule("1F1B", 3, 1, 8)
    memory = Memory([120 * MEBIBYTE] * 3, [schedule.live_microbatches(stage) for stage in range(3)], copies=4)
    equal, slow = [1.0] * 3, [1.0, 0.5, 1.0]
    assert table(DOCS / "explanation/partition.md", "An example") == [
        documented("Even", even(6, 3), equal, costs, memory),
        documented("Balanced", balanced(costs, range(3), equal).chunks, equal, costs, memory),
        documented("Balanced, stage 1 half as fast", balanced(costs, range(3), slow).chunks, slow, costs, memory),
        documented("Balanced, 120 MiB a stage", balanced(costs, range(3), equal, memory).chunks, equal, costs, memory),
    ]
