"""The invariant: whatever is lost at whatever moment, a step is whole, and it is no older than promised."""

import random
from collections.abc import Iterator

import pytest

from pipelinejob_worker.recovery.pieces import Incarnation
from tests.unit.worker.recovery.model import Memory, World

SEEDS = range(8)


def placements(stages: int, rng: random.Random) -> list[list[int]]:
    """Layers in chunks that are placed anyhow, at least one chunk a stage."""
    chunks = stages * rng.choice([1, 2])
    owner = [*range(stages), *(rng.randrange(stages) for _ in range(chunks - stages))]
    rng.shuffle(owner)
    return [[layer for layer, stage in enumerate(owner) if stage == rank] for rank in range(stages)]


def world(seed: int, stages: int) -> World:
    """A job whose nodes have half of its pods at most, which leaves each rank a guard on another one."""
    rng = random.Random(seed * 100 + stages)
    nodes = [f"node-{rank // 2}" if rng.random() < 0.5 and stages > 3 else f"own-{rank}" for rank in range(stages)]
    return World(rng, placements(stages, rng), nodes)


def losses(world: World) -> Iterator[set[int]]:
    """The ranks of each node."""
    for node in sorted(set(world.nodes)):
        yield {rank for rank in world.ranks if world.nodes[rank] == node}


def survives(world: World, at_least: int) -> None:
    """The loss of any one node leaves a step that is whole and recent."""
    for lost in losses(world):
        agreed = world.agreed(lost)
        found = agreed[0] if agreed else 0
        assert found >= at_least, f"without {lost} only step {found} is whole, {world.committed} is committed"


@pytest.mark.parametrize("stages", range(2, 7))
@pytest.mark.parametrize("seed", SEEDS)
def test_the_loss_of_a_node_at_any_moment_costs_at_most_one_committed_step(seed: int, stages: int) -> None:
    job = world(seed, stages)
    for _ in range(120 * stages):
        job.advance()
        survives(job, job.committed - 1)
    assert job.committed >= 3, "the run was long enough to overwrite slots"


@pytest.mark.parametrize("stages", range(1, 7))
def test_the_death_of_workers_and_agents_costs_at_most_one_committed_step(stages: int) -> None:
    job = world(7, stages)
    for _ in range(120 * stages):
        job.advance()
        agreed = job.agreed()
        assert (agreed[0] if agreed else 0) >= job.committed - 1


@pytest.mark.parametrize("stages", [2, 3, 5])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_guard_that_is_late_costs_more_steps_but_never_the_last_guarded_one(seed: int, stages: int) -> None:
    job = world(seed, stages)
    job.impatient = True
    denied = 0
    for _ in range(200 * stages):
        job.advance()
        known = [protection.guarded or 0 for protection in job.protections.values()]
        survives(job, max(known, default=0))
        denied = max([denied, *(protection.denied for protection in job.protections.values())])
    assert denied >= 1, "some vote was cast before the guard had answered"


@pytest.mark.parametrize("stages", [2, 3, 4, 6])
@pytest.mark.parametrize("seed", SEEDS)
def test_kills_at_any_moment_of_training_and_recovery_lose_nothing_more(seed: int, stages: int) -> None:
    """Node losses come when all ranks are guarded; deaths of workers and agents whenever."""
    job = world(seed, stages)
    recoveries = 0
    for _ in range(25):
        for _ in range(job.rng.randrange(60 * stages)):
            job.advance()
        before = job.committed
        everyone_guarded = all(job.guarded_step.get(rank, 0) >= job.step > 0 for rank in job.ranks)
        if everyone_guarded:
            job.lose(job.rng.choice(list(losses(job))))
            if job.rng.random() < 0.5:  # the new pods are elsewhere
                job.nodes[job.rng.randrange(stages)] = f"new-{recoveries}"
        job.begin_incarnation()
        assert job.step >= before - 1
        recoveries += everyone_guarded
        while len(job.applied) < stages and job.rng.random() < 0.9:
            job.advance()
    assert recoveries >= 3


@pytest.mark.parametrize("seed", SEEDS)
def test_a_lost_pod_that_comes_back_with_an_old_memory_is_not_mixed_with_the_new_history(seed: int) -> None:
    job = world(seed, 4)
    returned = 0
    for round_ in range(12):
        for _ in range(job.rng.randrange(100, 250)):
            job.advance()
        rank = job.rng.randrange(4)
        absent = job.memories[rank]
        job.lose([rank])
        job.begin_incarnation()  # without it; computed again, the same steps have other values
        for _ in range(job.rng.randrange(100, 250)):
            job.advance()
        if round_ % 2:
            job.memories[rank] = absent
            returned += 1
        job.begin_incarnation()  # the model asserts that all pieces are of one history
        assert job.incarnation > Incarnation(1, 2 * round_ + 1)
        values = {
            job.memories[holder].find(holding.held)[1]
            for step, holdings in [job.agreed() or (0, [])]
            for holding in holdings
            for holder in [holding.rank]
        }
        assert len(values) <= 1, "owners and guards hold the same history"
    assert returned == 6


def test_two_ranks_that_guard_each_other_are_not_lost_together_without_noticing() -> None:
    job = world(1, 2)
    while job.committed < 4:
        job.advance()
    assert job.agreed({0, 1}) is None
    job.lose({0, 1})
    assert job.memories == [Memory(), Memory()]
    job.begin_incarnation()
    assert job.step == 0
