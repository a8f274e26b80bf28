"""How long is too long, and how often is too often."""

import pytest

from pipelinejob_worker.recovery.deadlines import (
    FREE_ATTEMPTS,
    LONGEST_WAIT,
    Crash,
    GiveUp,
    Retry,
    after_crash,
    step_deadline,
    wait_after,
)


@pytest.mark.parametrize(
    ("measured", "configured", "deadline"),
    [
        ([], 0, 600),
        ([0.1, 0.1], 0, 600),
        ([0.1, 0.1, 0.1], 0, 10),
        ([3.0, 4.0, 3.0], 0, 20),
        ([3.0, 4.0, 3.0], 7, 7),
        ([], 7, 7),
    ],
)
def test_the_deadline_of_a_step_follows_the_slowest_measured(
    measured: list[float], configured: float, deadline: float
) -> None:
    assert step_deadline(measured, configured) == deadline


def crashes(*at_step: tuple[float, int]) -> list[Crash]:
    return [Crash(at=at, step=step) for at, step in at_step]


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([(0, 5)], Retry(0)),
        ([(0, 5), (1, 6)], Retry(0)),
        ([(0, 5), (1, 5)], Retry(1)),
        ([(0, 5), (1, 5), (2, 5)], Retry(2)),
        ([(0, 5), (1, 5), (2, 5), (3, 5)], Retry(4)),
        ([(0, 5), (1, 5), (2, 5), (3, 5), (4, 6)], Retry(0)),
        ([(at, 5) for at in range(5)], GiveUp("the worker has ended 5 times in a row after step 5")),
    ],
)
def test_without_progress_the_delay_doubles_until_it_is_hopeless(
    history: list[tuple[float, int]], expected: object
) -> None:
    assert after_crash(crashes(*history), 10, budget=10, window=3600) == expected


def test_the_budget_is_one_of_a_window_not_of_a_life() -> None:
    history = crashes(*((float(at), at) for at in range(11)))
    assert after_crash(history, 10, budget=11, window=60) == Retry(0)
    spent = after_crash(history, 10, budget=10, window=60)
    assert spent == GiveUp("spec.recovery.maxRestarts: the worker has ended 11 times within 60 s; allowed: 10")
    assert after_crash(history, 65, budget=10, window=60) == Retry(0)


def test_incarnations_that_come_to_nothing_follow_each_other_ever_later() -> None:
    assert [wait_after(count) for count in (0, FREE_ATTEMPTS)] == [0, 0]
    waits = [wait_after(FREE_ATTEMPTS + count) for count in range(1, 20)]
    assert waits == sorted(waits)
    assert (waits[0], waits[-1]) == (0.2, LONGEST_WAIT)
