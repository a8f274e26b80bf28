"""The benchmark compares what it says it compares."""

import pytest

from tools.bench.placement import CROWDED, LEVELS, Case, cost, in_levels, run


@pytest.mark.parametrize("case", [Case(8, 64), Case(24, 128, taken=CROWDED), Case(3, 64, pipelines=4)])
def test_a_plan_costs_no_more_than_other_ways_to_place_the_same_stages(case) -> None:
    result = run(case)
    costs = result["cost"]
    assert result["least"] <= costs["planned"] <= min(costs["greedy"], costs["random"])
    assert case.pipelines > 1 or result["least"] == costs["planned"]


def test_a_placement_that_another_made_is_measured_alike() -> None:
    assert in_levels(cost(Case(4, 64), ["node-00000", "node-00000", "node-00001", "node-00016"]), LEVELS) == "0/0/1/1"


def test_a_cost_is_shown_as_crossings_by_level() -> None:
    assert in_levels(2_0000_0003_0012, LEVELS) == "2/0/3/12"
