"""The one rule, beside brute force; and fetching from whoever has least to send."""

import random
from collections import Counter, defaultdict
from itertools import product
from typing import Any

import pytest

from pipelinejob_worker.recovery.agreement import Fetch, Holding, agree, assign, held_twice
from pipelinejob_worker.recovery.pieces import Held, Incarnation, Lineage, Piece
from pipelinejob_worker.recovery.placement import COPIES_PER_RANK, copy_holders

FIRST = Incarnation(1, 1)


def held(layer: int, step: int, *, share: int = 0, shares: int = 1, **fields: Any) -> Held:
    values: dict[str, Any] = {"layers": 3, "size": 1} | fields
    return Held(piece=Piece(layer, share, shares), step=step, written=FIRST, **values)


def by_brute_force(inventories: dict[int, list[Held]], layers: int) -> int | None:
    """The largest step such that for every layer some number of shares is there in full."""
    everything = [each for inventory in inventories.values() for each in inventory]
    for step in sorted({each.step for each in everything}, reverse=True):
        pieces = {each.piece for each in everything if each.step == step}
        if all(
            any(all(Piece(layer, share, shares) in pieces for share in range(shares)) for shares in (1, 2, 3))
            for layer in range(layers)
        ):
            return step
    return None


def test_the_step_is_the_largest_at_which_every_layer_is_held_by_anyone() -> None:
    results = [agrees_with_brute_force(random.Random(seed)) for seed in range(300)]
    assert 50 < results.count(None) < 250, "cases of either kind"


def agrees_with_brute_force(rng: random.Random) -> int | None:
    layers = rng.randrange(1, 4)
    inventories: dict[int, list[Held]] = {}
    for rank in range(rng.randrange(1, 5)):
        inventories[rank] = []
        for _ in range(rng.randrange(2 * layers + 3)):
            shares = rng.choice([1, 1, 1, 2, 3])
            piece = {"share": rng.randrange(shares), "shares": shares, "layers": layers, "copied": rng.random() < 0.5}
            inventories[rank].append(held(rng.randrange(layers), rng.randrange(5, 9), **piece))
    agreed = agree(inventories, Lineage())
    step = agreed[0] if agreed else None
    assert step == by_brute_force(inventories, layers)
    assert all(holding.held in inventories[holding.rank] for holding in (agreed[1] if agreed else []))
    return step


def test_void_pieces_do_not_count() -> None:
    inventories = {0: [held(0, 7, layers=1), held(0, 8, layers=1)]}
    assert agree(inventories, Lineage()) == (8, [Holding(rank=0, held=held(0, 8, layers=1))])
    rolled_back = Lineage().rolled_back(Incarnation(1, 2), 7)
    assert agree(inventories, rolled_back) == (7, [Holding(rank=0, held=held(0, 7, layers=1))])


def test_nothing_held_is_no_step() -> None:
    assert agree({0: [], 1: []}, Lineage()) is None


def holdings(*ranks: list[Held]) -> list[Holding]:
    return [Holding(rank=rank, held=each) for rank, inventory in enumerate(ranks) for each in inventory]


def test_an_owner_fetches_nothing_and_a_copy_at_hand_comes_before_one_elsewhere() -> None:
    here = holdings([held(0, 5)], [held(1, 5), held(0, 5, copied=True)], [held(2, 5), held(1, 5, copied=True)])
    assert assign(here, {0: [0], 1: [1], 2: [2]}) == {0: [], 1: [], 2: []}
    assert assign(here, {1: [0, 1], 2: [2]}) == {1: [Fetch(held(0, 5, copied=True), 1, sole=True)], 2: []}


def test_whoever_alone_needs_a_layer_is_told_so() -> None:
    """It may make a copy that it keeps its own: nobody will ask it to keep that any more."""
    here = holdings([held(0, 5, layers=2), held(1, 5, layers=2)], [])
    fetches = assign(here, {0: [0], 1: [0, 1]})[1]
    assert {fetch.held.piece.layer: fetch.sole for fetch in fetches} == {0: False, 1: True}


def test_a_step_is_held_twice_when_each_of_its_pieces_is_held_by_two_ranks() -> None:
    own, copies = [held(0, 5), held(1, 5)], [held(1, 5, copied=True), held(0, 5, copied=True)]
    assert held_twice(holdings([own[0], copies[0]], [own[1], copies[1]]))
    assert not held_twice(holdings([own[0], copies[0]], [own[1]]))
    assert not held_twice(holdings([own[0], copies[1]], [own[1], copies[0]])), "a rank's own copy is lost with it"


def test_all_shares_of_a_layer_are_fetched() -> None:
    shares = [held(0, 5, share=share, shares=2, layers=1) for share in range(2)]
    assert assign(holdings([shares[0]], [shares[1]]), {0: [0], 1: [0]}) == {
        0: [Fetch(shares[1], 1)],
        1: [Fetch(shares[0], 0)],
    }


def test_the_load_is_spread_over_those_that_hold_a_piece() -> None:
    many = 12
    copies = [held(layer, 5, layers=many, size=10 + layer) for layer in range(many)]
    fetches = assign(holdings([], *[copies] * 4), {0: range(many)})[0]
    assert sorted(fetch.held.piece.layer for fetch in fetches) == list(range(many))
    sent: dict[int, int] = defaultdict(int)
    for fetch in fetches:
        sent[fetch.source] += fetch.held.size
    assert sent.keys() == {1, 2, 3, 4}
    assert max(sent.values()) <= 4 / 3 * sum(each.size for each in copies) / 4


@pytest.mark.parametrize("count", range(2, 7))
def test_as_many_as_possible_are_guarded_on_another_node_and_nobody_guards_more_than_two(count: int) -> None:
    for nodes in product("abc", repeat=count):
        guards = [guard for guard in copy_holders(nodes) if guard is not None]
        assert all(guard != rank for rank, guard in enumerate(guards))
        fullest = max(nodes.count(node) for node in nodes)
        others = count - fullest
        elsewhere = sum(nodes[guard] != nodes[rank] for rank, guard in enumerate(guards))
        assert elsewhere == min(fullest, COPIES_PER_RANK * others) + others, nodes
        loads = Counter(guards).values()
        assert max(loads) <= COPIES_PER_RANK, nodes
        assert fullest > others or max(loads) == 1, "one copy each where that is enough"


def test_a_single_rank_has_no_guard() -> None:
    assert copy_holders(["a"]) == [None]
