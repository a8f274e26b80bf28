"""Parts of the planner whose faults the whole would hide."""

from itertools import pairwise, product
from random import Random

from pipelinejob_operator.placement import chain, gaps
from pipelinejob_operator.placement.order import walk
from pipelinejob_operator.placement.tree import build, distance, ranked


def random_rooms(random: Random, depth: int, hosts: int) -> dict[tuple[str, ...], int]:
    paths = {tuple(str(random.randint(0, 2)) for _ in range(depth)) for _ in range(hosts)}
    return {path: random.choice([0, 1, 1, 2]) for path in sorted(paths)}


def cheapest_way(rooms, size, weights, before, after) -> int | None:
    """Over all sequences of hosts between the ends."""
    costs = []
    for way in product(sorted(rooms), repeat=size):
        if all(way.count(host) <= rooms[host] for host in way):
            whole = [host for host in (before, *way, after) if host is not None]
            costs.append(sum(distance(one, other, weights) for one, other in pairwise(whole)))
    return min(costs, default=None)


def test_a_way_between_two_ends_is_a_cheapest_one() -> None:
    random = Random(1)
    left = 0
    for _ in range(1500):
        depth = random.randint(1, 3)
        rooms = {host: random.choice([room, 4 - room]) for host, room in random_rooms(random, depth, 6).items()}
        weights = sorted((random.choice([1, 1, 2, 3, 5]) for _ in range(depth)), reverse=True)
        size = random.randint(1, 4)
        ends = [random.choice(sorted(rooms)), random.choice(sorted(rooms))]
        ends[random.randint(0, 1)] = random.choice([None, ends[0], ends[1]])
        if ends == [None, None]:
            continue
        found = gaps.fill(rooms, size, weights, *ends)
        least = cheapest_way(rooms, size, weights, *ends)
        if found is None:
            assert least is None
            continue
        assert all(found.count(host) <= rooms[host] for host in found)
        whole = [host for host in (ends[0], *found, ends[1]) if host is not None]
        assert sum(distance(one, other, weights) for one, other in pairwise(whole)) == least
        left += None not in ends and least > 2 * weights[-1]
    assert left > 100


def test_the_bound_of_a_domain_is_never_above_its_cheapest_chain_and_often_meets_it() -> None:
    random = Random(2)
    compared, met = 0, 0
    for _ in range(1000):
        depth = random.randint(1, 3)
        root = build(random_rooms(random, depth, 8))
        weights = sorted((random.choice([1, 2, 3, 5, 20]) for _ in range(depth)), reverse=True)
        size = random.randint(1, 6)
        for level in range(depth + 1):
            for bound, domain in ranked(root, level, size, weights):
                least = chain.Tables(size, weights).of(domain)[size]
                assert bound <= least
                compared += 1
                met += bound == least
    assert compared > 1000
    assert met > 0.8 * compared, (met, compared)


def test_the_bound_counts_the_fewest_domains_of_each_level() -> None:
    root = build({("z", "a", "1"): 2, ("z", "a", "2"): 1, ("z", "b", "1"): 1, ("y", "c", "1"): 1})
    assert [(bound, domain.path) for bound, domain in ranked(root, 0, 5, [100, 10, 1])] == [(100 + 10 + 1, ())]
    assert [(bound, domain.path) for bound, domain in ranked(root, 1, 4, [100, 10, 1])] == [(10 + 1, ("z",))]


def test_a_way_leaves_a_rack_only_if_that_is_cheaper_with_the_way_back() -> None:
    rooms = {("r", str(host)): 1 for host in range(4)} | {("s", "0"): 4}
    ends = ("r", "8"), ("r", "9")
    stay, leave = [host for host in rooms if host[0] == "r"], [("s", "0")] * 4
    assert sorted(gaps.fill(rooms, 4, [3, 1], *ends)) == stay  # 5 links of 1, not 2 of 3
    assert gaps.fill(rooms, 4, [2, 1], *ends) == leave  # 2 links of 2, not 5 of 1
    assert set(gaps.fill(rooms, 2, [5, 3], *ends)) < set(stay)  # 3 links of 3, not 2 of 5
    assert gaps.fill(rooms, 4, [3, 1], ends[0], None) == leave  # no way back: 1 link of 3, not 4 of 1


def test_a_walk_puts_a_new_host_where_it_displaces_no_stage() -> None:
    first, second, new = ("a", "1", "x"), ("a", "2", "y"), ("a", "2", "b")
    held = {**dict.fromkeys(range(4), first), 4: second, 5: second}
    assert walk({first: 4, new: 2, second: 2}, held) == [first] * 4 + [second] * 2 + [new] * 2


def test_a_walk_holds_each_domain_in_one_piece_whatever_is_held() -> None:
    random = Random(3)
    for _ in range(500):
        rooms = {host: room for host, room in random_rooms(random, 3, 8).items() if room}
        hosts = [host for host in rooms for _ in range(rooms[host])]
        held = {stage: random.choice(hosts) for stage in range(len(hosts)) if random.random() < 0.7}
        line = walk(rooms, held)
        assert sorted(line) == sorted(hosts)
        for depth in (1, 2, 3):
            pieces = 1 + sum(one[:depth] != other[:depth] for one, other in pairwise(line))
            assert pieces == len({host[:depth] for host in line})


def test_a_walk_through_hosts_that_hold_their_stages_already_changes_nothing() -> None:
    random = Random(4)
    for _ in range(300):
        rooms = {host: room for host, room in random_rooms(random, 3, 8).items() if room}
        line = walk(rooms, {})
        order = {host: random.random() for host in {host[:depth] for host in line for depth in (1, 2, 3)}}
        line.sort(key=lambda host: [order[host[:depth]] for depth in (1, 2, 3)])
        assert walk(rooms, dict(enumerate(line))) == line
