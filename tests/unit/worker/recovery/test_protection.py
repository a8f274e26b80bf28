"""When a snapshot is taken: only what the vote has shown to all decides."""

import pytest

from pipelinejob_worker.recovery.protection import (
    GUARD_WAIT_SECONDS,
    PATIENCE_VOTES,
    Protection,
    decide,
    interval,
)


def test_the_first_snapshot_needs_nobodys_word() -> None:
    assert decide(Protection(), 1, 0, 0) == (Protection(snapshot=1), True)


def test_when_all_are_guarded_the_next_snapshot_is_taken() -> None:
    assert decide(Protection(snapshot=4), 5, 0, 0) == (Protection(snapshot=5, guarded=4), True)


def test_as_long_as_one_rank_is_not_guarded_nothing_is_overwritten() -> None:
    protection, taken = Protection(snapshot=4, guarded=3), []
    for step in range(5, 8):
        protection, take = decide(protection, step, 0, 1)
        taken.append(take)
    assert taken == [False] * 3
    assert protection == Protection(snapshot=4, guarded=3, denied=3)
    assert protection.steps_at_risk(7) == 4
    assert decide(protection, 8, 0, 0) == (Protection(snapshot=8, guarded=4), True)


def test_between_two_snapshots_the_guards_may_take_their_time() -> None:
    protection = Protection(interval=3, snapshot=4, guarded=1)
    assert [protection.due(step) for step in range(5, 9)] == [False, False, True, True]
    protection, take = decide(protection, 5, 0, 2)
    assert (protection, take) == (Protection(interval=3, snapshot=4, guarded=1), False)
    protection, take = decide(protection, 6, 0, 0)
    assert (protection, take) == (Protection(interval=3, snapshot=4, guarded=4), False)
    assert decide(protection, 7, 0, 0) == (Protection(interval=3, snapshot=7, guarded=4), True)


def test_a_snapshot_that_all_want_before_they_leave_is_taken_as_soon_as_nothing_is_lost_by_it() -> None:
    protection = Protection(interval=10, snapshot=4, guarded=4)
    assert decide(protection, 5, 0, 0, wanted=True)[0].snapshot == 5
    protection = Protection(interval=10, snapshot=4, guarded=1)
    protection, take = decide(protection, 5, 0, 1, wanted=True)
    assert not take
    assert decide(protection, 6, 0, 0, wanted=True)[1]


def test_a_vote_waits_for_the_guard_only_where_it_matters_and_only_once() -> None:
    assert Protection(snapshot=4).wait_seconds(5) == GUARD_WAIT_SECONDS
    assert Protection(snapshot=4, interval=2).wait_seconds(5) == 0
    assert Protection(snapshot=4, denied=1).wait_seconds(6) == 0
    assert Protection().wait_seconds(1) == 0


def test_a_guard_that_stays_away_is_given_up_and_taken_back_when_all_are_guarded() -> None:
    protection = Protection(snapshot=4, guarded=3, denied=PATIENCE_VOTES - 2)
    protection, take = decide(protection, 30, 0, 1)
    assert not take
    assert not protection.unprotected
    protection, take = decide(protection, 31, 1, 1)
    assert not take, "a rank has not even its own snapshot"
    protection, take = decide(protection, 32, 0, 1)
    assert take
    assert protection.unprotected
    assert protection.guarded is None, "the older slots, which were guarded, are overwritten"
    assert protection.steps_at_risk(32) == 32
    protection, take = decide(protection, 33, 0, 0)
    assert take
    assert not protection.unprotected
    assert protection.guarded == 32


@pytest.mark.parametrize(
    ("step", "snapshot", "copy", "expected"),
    [
        ([5.0, 4.0], [0.1, 0.15], [2.0, 4.9], 1),
        ([1.0], [0.15], [0.5], 5),
        ([1.0], [0.01], [3.5], 4),
        ([0.0], [0.1], [0.1], 1),
    ],
)
def test_the_interval_keeps_the_cost_of_the_slowest_rank_within_three_percent(
    step: list[float], snapshot: list[float], copy: list[float], expected: int
) -> None:
    assert interval(step, snapshot, copy) == expected
