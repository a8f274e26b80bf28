"""Which pieces count: those of the history that training has gone on from."""

import random

import pytest

from pipelinejob_worker.recovery.pieces import (
    NEVER,
    ROLLBACKS_KEPT,
    Held,
    Incarnation,
    Lineage,
    Piece,
    Rollback,
    complete_layers,
)


def held(step: int, attempt: int) -> Held:
    return Held(piece=Piece(0), step=step, written=Incarnation(1, attempt), size=1, layers=1)


def lineage(*rollbacks: tuple[int, int]) -> Lineage:
    known = Lineage()
    for attempt, step in rollbacks:
        known = known.rolled_back(Incarnation(1, attempt), step)
    return known


@pytest.mark.parametrize(
    ("piece", "counts"),
    [
        (held(7, 1), True),  # incarnation 2 has gone on from it
        (held(8, 1), False),
        (held(8, 2), True),
        (held(9, 2), True),
        (held(10, 2), False),  # 3 has gone on from 9
        (held(10, 3), True),
        (held(10, 4), True),
    ],
)
def test_what_was_computed_above_a_restored_step_is_void(piece: Held, counts: bool) -> None:
    assert lineage((2, 7), (3, 9)).counts(piece) is counts


def test_an_epoch_comes_before_any_attempt() -> None:
    rolled_back = Lineage().rolled_back(Incarnation(2, 1), 5)
    assert not rolled_back.counts(held(6, 99))
    assert rolled_back.counts(held(6, 1).model_copy(update={"written": Incarnation(2, 1)}))


def test_a_later_rollback_to_a_lower_step_makes_an_earlier_one_superfluous() -> None:
    assert lineage((2, 7), (3, 9), (4, 8)).rollbacks == (
        Rollback(incarnation=Incarnation(1, 2), step=7),
        Rollback(incarnation=Incarnation(1, 4), step=8),
    )


def test_knowledge_joined_in_any_order_is_the_same_and_voids_what_any_part_voids() -> None:
    rng = random.Random(3)
    for _ in range(200):
        rollbacks = [(attempt, rng.randrange(20)) for attempt in range(2, 10)]
        parts = [lineage(*rng.sample(rollbacks, rng.randrange(9))) for _ in range(3)]
        whole = parts[0].joined(parts[1:])
        assert whole == parts[2].joined(parts[:2]) == Lineage().joined(parts)
        for piece in (held(step, attempt) for step in range(20) for attempt in range(1, 10)):
            assert whole.counts(piece) == all(part.counts(piece) for part in parts)


def test_what_is_older_than_the_rollbacks_kept_counts_no_more() -> None:
    count = ROLLBACKS_KEPT + 10
    known = lineage(*((attempt, 10 * attempt) for attempt in range(1, count + 1)))
    assert len(known.rollbacks) == ROLLBACKS_KEPT
    assert known.forgotten == Incarnation(1, 10)
    assert not known.counts(held(1, 9)), "it may have been voided by a rollback that is forgotten"
    assert known.counts(held(100, 10))
    assert Lineage().forgotten == NEVER


def test_it_travels_as_json() -> None:
    known = lineage((2, 7), (3, 9))
    assert Lineage.model_validate_json(known.to_json()) == known


def test_a_layer_is_complete_with_all_its_shares_of_one_kind() -> None:
    pieces = [Piece(0), Piece(1, 0, 2), Piece(1, 1, 2), Piece(2, 0, 2), Piece(3, 0, 2), Piece(3, 1, 3), Piece(4, 1, 2)]
    assert complete_layers([*pieces, Piece(4, 0, 2), Piece(4)]) == {0: 1, 1: 2, 4: 1}
