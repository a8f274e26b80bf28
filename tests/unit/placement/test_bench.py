"""The benchmark compares what it says it compares."""

import pytest

from tools.bench_placement import CROWDED, LEVELS, Case, in_levels, run


@pytest.mark.parametrize("case", [Case(8, 64), Case(24, 128, taken=CROWDED), Case(3, 64, pipelines=4)])
def test_a_plan_costs_no_more_than_other_ways_to_place_the_same_stages(case) -> None:
    result = run(case, lambda of: [f"node-{number:05}" for number in range(of.stages * of.pipelines)])
    cost = result["cost"]
    assert result["least"] <= cost["planned"] <= min(cost["greedy"], cost["random"])
    assert case.pipelines > 1 or result["least"] == cost["planned"]
    assert cost["kube_scheduler"] > 0
    assert run(case)["cost"] == {**cost, "kube_scheduler": None}


def test_a_cost_is_shown_as_crossings_by_level() -> None:
    assert in_levels(2_0000_0003_0012, LEVELS) == "2/0/3/12"
    assert in_levels(None, LEVELS) == "-"
