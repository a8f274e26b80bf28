"""Which pipeline serves a prompt."""

import random
from collections import Counter

import pytest

from pipelinejob_worker.front.routing import PREFIX_TOKENS, choose

IDLE = dict.fromkeys(range(4), 0)


def prompts(count: int) -> list[list[int]]:
    source = random.Random(0)
    return [[source.randrange(50_000) for _ in range(100)] for _ in range(count)]


def test_prompts_with_the_same_beginning_meet() -> None:
    for prompt in prompts(50):
        other = [*prompt[:PREFIX_TOKENS], 1, 2, 3]
        assert choose(prompt, IDLE) == choose(other, IDLE) == choose(prompt, dict(reversed(IDLE.items())))


def test_different_prompts_are_spread() -> None:
    counts = Counter(choose(prompt, IDLE) for prompt in prompts(400))
    assert set(counts) == set(IDLE)
    assert min(counts.values()) > 70


def test_when_a_pipeline_leaves_only_its_own_prompts_move() -> None:
    left = {0: 0, 1: 0, 3: 0}
    for prompt in prompts(100):
        if (before := choose(prompt, IDLE)) != 2:
            assert choose(prompt, left) == before


def test_one_popular_prefix_does_not_queue_while_others_idle() -> None:
    loads = dict.fromkeys(range(4), 0)
    prompt = prompts(1)[0]
    for _ in range(100):
        loads[choose(prompt, loads)] += 1
    assert max(loads.values()) <= 32  # a quarter more than the mean, rounded up
    assert sorted(loads.values())[-1] == loads[choose(prompt, IDLE)]


@pytest.mark.parametrize(
    ("loads", "allowed"),
    [
        ({0: 0}, {0}),
        ({5: 900}, {5}),
        ({0: 1, 1: 0}, {0, 1}),
        ({0: 2, 1: 0}, {1}),
        ({0: 9, 1: 9, 2: 3}, {0, 1, 2}),
        ({0: 20, 1: 10, 2: 3}, {1, 2}),
        ({0: 100, 1: 0, 2: 0}, {1, 2}),
    ],
)
def test_a_pipeline_that_is_too_busy_is_passed_over(loads: dict[int, int], allowed: set[int]) -> None:
    assert {choose(prompt, loads) for prompt in prompts(60)} == allowed


def test_short_and_equal_prompts_have_a_place_as_well() -> None:
    assert choose([1], IDLE) in IDLE
    with pytest.raises(ValueError, match="no pipeline"):
        choose([1], {})
