"""The partition is the best one there is, and its bubble the one that theory allows."""

from itertools import combinations, pairwise
from random import Random

import pytest

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.models import model_of
from pipelinejob_worker.pipeline.partition import describe, partition
from pipelinejob_worker.pipeline.schedule import bubble_limit
from pipelinejob_worker.protocol import Model, Preset


def dearest(costs: list[float], cuts: list[range]) -> float:
    return max(sum(costs[index] for index in cut) for cut in cuts)


def cheapest_of_all(costs: list[float], stages: int) -> float:
    every = combinations(range(1, len(costs)), stages - 1)
    return min(dearest(costs, [range(a, b) for a, b in pairwise((0, *cuts, len(costs)))]) for cuts in every)


@pytest.mark.parametrize("seed", range(40))
def test_no_other_cut_has_a_cheaper_dearest_stage(seed: int) -> None:
    random = Random(seed)
    costs = [float(random.choice([0, 0, 1, 2, 3, 10])) for _ in range(random.randint(1, 9))]
    for stages in range(1, len(costs) + 1):
        cuts = partition(costs, stages)
        assert [index for cut in cuts for index in cut] == list(range(len(costs))), "contiguous and complete"
        assert len(cuts) == stages
        assert all(cuts), "no stage is empty"
        assert dearest(costs, cuts) == cheapest_of_all(costs, stages)


def test_the_largest_pipeline_is_cut_at_once() -> None:
    assert len(partition([1.0] * 1026, 512)) == 512


def test_embedding_and_head_are_not_counted_as_blocks() -> None:
    preset = Preset(name="gpt", layers=8, width=256, heads=8, context=256)
    cuts = partition(model_of(Model(preset=preset)).costs, 4)
    assert [describe(cut) for cut in cuts] == ["0-2", "3-4", "5-6", "7-9"]


def test_fewer_layers_than_stages_is_refused_with_a_cure() -> None:
    with pytest.raises(
        ConfigurationError, match=r"spec\.stages: 3 stages cannot share 2 layers.*lower spec\.stages to 2"
    ):
        partition([1.0, 1.0], 3)


@pytest.mark.parametrize(("stages", "microbatches", "limit"), [(1, 8, 0), (4, 8, 3 / 11), (4, 4, 3 / 7), (2, 1, 1 / 2)])
def test_bubble_limit(stages: int, microbatches: int, limit: float) -> None:
    assert bubble_limit(stages, microbatches) == limit
