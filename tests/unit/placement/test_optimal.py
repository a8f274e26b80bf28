"""The planner against all placements there are, on thousands of random small clusters."""

from random import Random

import pytest

from pipelinejob_operator.placement.fit import Demand
from pipelinejob_operator.placement.planner import Infeasible, Plan, cost_of, plan
from tests.unit.placement.trees import SMALL, assert_fits, best, cost, random_cluster

LARGE = Demand((("cpu", 2), ("gpu", 1), ("pods", 1)))
WIDE = Demand((("cpu", 1), ("gpu", 2), ("pods", 1)))
SLIGHT = Demand((("cpu", 1), ("pods", 1)))


def test_one_chain_of_equal_stages_costs_the_least_there_is() -> None:
    random = Random(1)
    feasible = 0
    for _ in range(3000):
        cluster, stages = random_cluster(random), random.randint(1, 6)
        found, least = plan(cluster.nodes, cluster.levels, [SMALL] * stages), best(cluster, [SMALL] * stages)
        if isinstance(found, Infeasible):
            assert least is None
            continue
        feasible += 1
        assert_fits(cluster, [SMALL] * stages, found.nodes)
        assert least is not None
        assert found.cost == found.least == cost(cluster, found.nodes) == least[0]
    assert feasible > 1500


@pytest.mark.parametrize("separation", ["Required", "Preferred"])
def test_neighbours_on_different_hosts_cost_the_least_there_is(separation) -> None:
    random = Random(2)
    several_pieces = 0
    for _ in range(1500):
        cluster, stages = random_cluster(random), random.randint(1, 6)
        demands = [SMALL] * stages
        found = plan(cluster.nodes, cluster.levels, demands, separation=separation)
        least = best(cluster, demands, apart=True)
        if least is None:
            loose = best(cluster, demands) if separation == "Preferred" else None
            assert (found.cost if isinstance(found, Plan) else None) == (loose[0] if loose else None)
            continue
        assert isinstance(found, Plan)
        assert_fits(cluster, demands, found.nodes)
        assert found.shared == 0
        assert all(one != two for one, two in zip(found.nodes, found.nodes[1:], strict=False))
        assert found.cost == cost(cluster, found.nodes) == least[0]
        unbroken = best(cluster, demands)
        assert unbroken is not None
        several_pieces += least[0] > unbroken[0]
    assert several_pieces > 100


@pytest.mark.parametrize("separation", ["Off", "Required"])
def test_all_stages_are_in_one_domain_of_the_required_level_at_the_least_cost(separation) -> None:
    random = Random(3)
    feasible = 0
    for _ in range(1000):
        cluster, stages = random_cluster(random), random.randint(1, 5)
        level = random.choice(cluster.levels[:-1] or cluster.levels).label
        demands = [SMALL] * stages
        found = plan(cluster.nodes, cluster.levels, demands, required_level=level, separation=separation)
        least = best(cluster, demands, within=level, apart=separation == "Required")
        assert (found.cost if isinstance(found, Plan) else None) == (least[0] if least else None)
        feasible += isinstance(found, Plan)
    assert feasible > 400


def test_one_gap_in_a_chain_is_filled_at_the_least_cost() -> None:
    random = Random(4)
    filled = 0
    for _ in range(2000):
        cluster, stages = random_cluster(random), random.randint(2, 6)
        first = random.randrange(stages)
        last = random.randrange(first, stages)
        keep = {rank: random.choice(cluster.nodes).name for rank in range(stages) if not first <= rank <= last}
        if not keep:
            continue
        demands = [SMALL] * stages
        found, least = plan(cluster.nodes, cluster.levels, demands, keep=keep), best(cluster, demands, fixed=keep)
        if isinstance(found, Infeasible):
            assert least is None
            continue
        filled += 1
        assert least is not None
        assert all(found.nodes[rank] == name for rank, name in keep.items())
        assert_fits(cluster, demands[: last - first + 1], found.nodes[first : last + 1])
        assert found.cost == cost(cluster, found.nodes) == least[0]
    assert filled > 1000


def test_a_plan_made_anew_costs_the_least_and_rarely_moves_more_than_it_must() -> None:
    random = Random(5)
    planned, fewest = 0, 0
    for _ in range(1500):
        cluster, stages = random_cluster(random), random.randint(2, 6)
        demands = [SMALL] * stages
        before = plan(cluster.nodes, cluster.levels, demands)
        if isinstance(before, Infeasible):
            continue
        lost = random.choice(before.nodes)
        current = {rank: name for rank, name in enumerate(before.nodes) if name != lost}
        rest = [item for item in cluster.nodes if item.name != lost]
        found = plan(rest, cluster.levels, demands, current=current)
        smaller = type(cluster)(tuple(rest), cluster.levels)
        least = best(smaller, demands, current=current)
        if isinstance(found, Infeasible):
            assert least is None
            continue
        assert least is not None
        assert_fits(smaller, demands, found.nodes)
        assert found.moved == tuple(rank for rank, name in current.items() if found.nodes[rank] != name)
        assert found.cost == least[0]
        assert len(found.moved) >= least[1]
        planned += 1
        fewest += len(found.moved) == least[1]
    assert planned > 500
    assert fewest >= 0.97 * planned, (fewest, planned)


def test_nothing_moves_while_the_plan_in_place_is_a_cheapest_one() -> None:
    random = Random(6)
    planned = 0
    for _ in range(500):
        cluster, stages = random_cluster(random), random.randint(1, 6)
        before = plan(cluster.nodes, cluster.levels, [SMALL] * stages)
        if isinstance(before, Plan):
            current = dict(enumerate(before.nodes))
            assert plan(cluster.nodes, cluster.levels, [SMALL] * stages, current=current) == before
            planned += 1
    assert planned > 200


def test_several_pipelines_cost_at_most_what_the_bound_says() -> None:
    random = Random(7)
    planned, exact = 0, 0
    for _ in range(600):
        cluster = random_cluster(random, hosts=5)
        pipelines, stages = random.choice([(2, 2), (2, 3), (3, 2), (6, 1), (4, 1)])
        demands = [SMALL] * (pipelines * stages)
        found = plan(cluster.nodes, cluster.levels, demands, pipelines=pipelines)
        least = best(cluster, demands, pipelines=pipelines)
        if isinstance(found, Infeasible):
            assert least is None
            continue
        assert least is not None
        assert found.least is not None
        assert_fits(cluster, demands, found.nodes)
        assert found.cost == cost(cluster, found.nodes, pipelines)
        assert found.least <= least[0] <= found.cost <= (min(pipelines, 2 * stages - 1) + 2) * found.least
        planned += 1
        exact += found.cost == least[0]
    assert planned > 150
    assert exact >= 0.9 * planned, (exact, planned)


def test_replicas_that_do_not_talk_to_each_other_cost_nearly_the_least_of_their_chains_alone() -> None:
    random = Random(11)
    planned, exact = 0, 0
    for _ in range(300):
        cluster = random_cluster(random, hosts=5)
        pipelines, stages = random.choice([(2, 2), (2, 3), (3, 2), (4, 1)])
        demands = [SMALL] * (pipelines * stages)
        found = plan(cluster.nodes, cluster.levels, demands, pipelines=pipelines, rings=False)
        least = best(cluster, demands, pipelines=pipelines, rings=False)
        if isinstance(found, Infeasible):
            assert least is None
            continue
        assert least is not None
        assert found.least is not None
        assert_fits(cluster, demands, found.nodes)
        assert found.cost == cost(cluster, found.nodes, pipelines, rings=False)
        assert all(item.ring == 0 for item in found.crossings)
        assert found.least <= least[0] <= found.cost
        planned += 1
        exact += found.cost == least[0]
    assert planned > 75
    assert exact >= 0.9 * planned, (exact, planned)


def test_unequal_stages_cost_at_most_what_they_would_if_all_were_as_large_as_the_largest() -> None:
    random = Random(8)
    planned, exact, missed, bounded = 0, 0, 0, 0
    for _ in range(1000):
        cluster = random_cluster(random, hosts=5, room=4, cpu=5)
        demands = [random.choice([SMALL, LARGE, WIDE, SLIGHT]) for _ in range(random.randint(2, 5))]
        found, least = plan(cluster.nodes, cluster.levels, demands), best(cluster, demands)
        if isinstance(found, Infeasible):
            missed += least is not None
            continue
        assert least is not None
        assert found.least is not None
        assert_fits(cluster, demands, found.nodes)
        assert found.least <= least[0] <= found.cost == cost(cluster, found.nodes)
        largest = {key: max(dict(demand.requests).get(key, 0) for demand in demands) for key in ("cpu", "gpu", "pods")}
        alike = [Demand(tuple(sorted((key, count) for key, count in largest.items() if count)))] * len(demands)
        bound = plan(cluster.nodes, cluster.levels, alike)
        if isinstance(bound, Plan):
            bounded += 1
            assert found.cost <= bound.cost
        planned += 1
        exact += found.cost == least[0]
    assert planned > 400
    assert bounded > 200
    assert exact >= 0.95 * planned, (exact, planned)
    assert missed == 0


@pytest.mark.parametrize(("pipelines", "stages"), [(1, 4), (1, 5), (2, 2), (2, 3)])
def test_whatever_is_to_be_apart_is_apart_and_nothing_feasible_is_missed(pipelines, stages) -> None:
    random = Random(9)
    planned = 0
    for _ in range(300):
        cluster = random_cluster(random, hosts=5, room=4, cpu=5)
        demands = [random.choice([SMALL, LARGE, WIDE][: 1 + 2 * (pipelines == 1)]) for _ in range(pipelines * stages)]
        found = plan(cluster.nodes, cluster.levels, demands, separation="Required", pipelines=pipelines)
        least = best(cluster, demands, apart=True, pipelines=pipelines)
        if isinstance(found, Infeasible):
            assert least is None
            continue
        planned += 1
        assert_fits(cluster, demands, found.nodes)
        assert found.shared == 0
        assert found.least is not None
        assert least is not None
        assert found.least <= least[0] <= found.cost == cost(cluster, found.nodes, pipelines)
        stay = dict(enumerate(found.nodes))
        again = plan(cluster.nodes, cluster.levels, demands, separation="Required", pipelines=pipelines, current=stay)
        assert isinstance(again, Plan)
        assert again.cost < found.cost or not again.moved
    assert planned > 50


@pytest.mark.parametrize("separation", ["Off", "Required"])
@pytest.mark.parametrize("pipelines", [1, 2])
def test_stages_that_are_kept_stay_and_the_others_find_room_if_there_is_any(separation, pipelines) -> None:
    random = Random(11)
    planned, exact = 0, 0
    for _ in range(500):
        cluster = random_cluster(random, hosts=5, cpu=5)
        stages = random.randint(2, 6 // pipelines)
        demands = [random.choice([SMALL, LARGE])] * (pipelines * stages)
        if random.random() < 0.3:
            demands[0] = SLIGHT
        kept = random.sample(range(len(demands)), random.randint(1, len(demands) - 1))
        keep = {rank: random.choice(cluster.nodes).name for rank in kept}
        found = plan(cluster.nodes, cluster.levels, demands, pipelines=pipelines, separation=separation, keep=keep)
        least = best(cluster, demands, pipelines=pipelines, fixed=keep, apart=separation == "Required")
        if isinstance(found, Infeasible):
            assert least is None
            continue
        assert {rank: found.nodes[rank] for rank in keep} == keep
        free = [rank for rank in range(len(demands)) if rank not in keep]
        assert_fits(cluster, [demands[rank] for rank in free], [found.nodes[rank] for rank in free])
        if least is None:
            # Kept neighbours share a host already; that is not held against the plan.
            assert separation == "Required"
            continue
        assert least[0] <= found.cost == cost(cluster, found.nodes, pipelines)
        planned += 1
        exact += found.cost == least[0]
    assert planned > 100
    assert exact >= 0.85 * planned, (exact, planned)


def test_the_cost_of_any_placement_is_that_of_its_links() -> None:
    random = Random(10)
    for _ in range(300):
        cluster = random_cluster(random)
        pipelines, stages = random.randint(1, 4), random.randint(1, 4)
        names = [random.choice(cluster.nodes).name for _ in range(pipelines * stages)]
        result = cost_of(cluster.nodes, cluster.levels, names, pipelines)
        assert result.cost == cost(cluster, names, pipelines)
        assert result.shared == sum(
            names[p * stages + s] == names[p * stages + s + 1] for p in range(pipelines) for s in range(stages - 1)
        )
