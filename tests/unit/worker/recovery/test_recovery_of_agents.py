"""Real agents that coordinate, copy and recover, killed at every message: the states are those of a calm run."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import product
from pathlib import Path

import pytest

from pipelinejob_worker.recovery.pieces import Incarnation
from tests.unit.worker.recovery.job import LAYERS, PIECE_BYTES, Job


@asynccontextmanager
async def running(directory: Path, ranks: int = 3, last_step: int = 12) -> AsyncIterator[Job]:
    job = Job(directory, ranks, last_step)
    await job.begin()
    try:
        yield job
    finally:
        await job.stop()


def fetched(job: Job) -> list[int]:
    """Bytes that each rank has fetched from others."""
    return [agent.keeper._client.traffic.received for agent in job.agents]


async def test_an_undisturbed_run_has_one_incarnation_and_copies_every_step(memory: Path) -> None:
    async with running(memory) as job:
        await job.until_end()
        assert job.undisturbed
        assert {plan.incarnation for agent in job.agents for plan in agent.plans} == {Incarnation(1, 1)}
        assert sum(agent.keeper.bytes_sent for agent in job.agents) >= (job.last_step - 1) * LAYERS * PIECE_BYTES


async def test_a_single_stage_has_no_guard_and_survives_its_worker(memory: Path) -> None:
    async with running(memory, ranks=1) as job:
        await job.until_step(4)
        job.agents[0].crash_worker()
        await job.until_end()
        assert job.undisturbed
        assert job.redone <= 1


@pytest.mark.parametrize("rank", [0, 2])
async def test_a_crashed_worker_goes_on_from_its_own_slots_and_nothing_travels_for_it(memory: Path, rank: int) -> None:
    async with running(memory) as job:
        await job.until_step(4)
        job.agents[rank].crash_worker()
        await job.until_end()
        assert job.undisturbed
        assert job.redone <= 1
        assert fetched(job) == [0, 0, 0]
        assert all(agent.plans[-1].incarnation == Incarnation(1, 2) for agent in job.agents)


@pytest.mark.parametrize("rank", range(3))
async def test_a_lost_pod_is_restored_from_its_guard_and_only_its_layers_travel(memory: Path, rank: int) -> None:
    async with running(memory) as job:
        await job.until_step(4)
        await job.replace(rank, memory_lost=True)
        await job.until_end()
        assert job.undisturbed
        assert job.redone <= 1
        lost = len(job.layers_of[rank]) * PIECE_BYTES
        assert fetched(job) == [lost if other == rank else 0 for other in range(3)]


async def test_all_workers_at_once(memory: Path) -> None:
    async with running(memory) as job:
        await job.until_step(4)
        for agent in job.agents:
            agent.crash_worker()
        await job.until_end()
        assert job.undisturbed
        assert job.redone <= 1


async def test_a_rank_and_its_guard_lost_together_begin_anew(memory: Path) -> None:
    async with running(memory, ranks=4) as job:
        await job.until_step(4)
        guard = job.agents[1].plans[-1].guards[1]
        assert guard is not None
        await job.agents[1].die()
        await job.replace(guard, memory_lost=True)
        job.agents[1] = job.new_agent(1)
        await job.agents[1].begin(job.epoch)
        await job.until_end()
        assert job.undisturbed
        assert job.agents[0].plans[-1].step is None


@pytest.mark.parametrize("memory_lost", [False, True])
async def test_the_coordinator_dies_and_its_successor_needs_nothing_of_it(memory: Path, memory_lost: bool) -> None:
    async with running(memory) as job:
        for step in (3, 6, 9):
            await job.until_step(step)
            await job.replace(0, memory_lost=memory_lost)
        await job.until_end()
        assert job.undisturbed
        assert job.redone <= 1
        assert job.agents[1].plans[-1].incarnation >= Incarnation(1, 4)


MESSAGES = [("up", "join"), ("down", "plan"), ("up", "applied"), ("down", "start"), ("up", "broken"), ("down", "abort")]


async def die_at(directory: Path, way: str, kind: str, forwarded: bool, victim: int, memory_lost: bool) -> str:
    """Crash a worker; at a message of the recovery that follows kill an agent too. Return what went wrong."""
    async with running(directory) as job:
        job.hold_at = 5
        await job.until_held()
        killed = False

        def hook(rank: int, direction: str, message: str, done: bool) -> None:
            nonlocal killed
            if not killed and rank in (1, victim) and (direction, message, done) == (way, kind, forwarded):
                killed = True
                job.spawn(job.replace(victim, memory_lost=memory_lost))
                job.release()

        job.hook = hook
        job.agents[1].crash_worker()
        await job.until_end()
        faults = {"no message of that kind": not killed, "other values": not job.undisturbed, "redone": job.redone > 1}
        return ", ".join(fault for fault, true in faults.items() if true)


@pytest.mark.parametrize(("way", "kind"), MESSAGES)
async def test_a_second_death_at_any_message_of_a_recovery(memory: Path, way: str, kind: str) -> None:
    cases = list(product([False, True], [0, 1, 2], [False, True]))
    results = await asyncio.gather(
        *(die_at(memory / str(number), way, kind, *case) for number, case in enumerate(cases))
    )
    assert dict(zip(cases, results, strict=True)) == dict.fromkeys(cases, "")


async def test_a_cut_network_is_noticed_by_silence_and_heals(memory: Path) -> None:
    async with running(memory) as job:
        job.hold_at = 5
        await job.until_held()
        relay = job.agents[2].relay
        assert relay
        relay.open.clear()
        started = time.monotonic()
        await job.until(lambda: job.agents[1].member.incarnation is None)
        assert 0.9 < time.monotonic() - started < 3
        relay.open.set()
        job.release()
        await job.until_end()
        assert job.undisturbed
        assert job.redone <= 1


async def test_a_frozen_pod_that_thaws_after_its_replacement_has_joined_does_no_harm(memory: Path) -> None:
    async with running(memory, last_step=40) as job:
        await job.until_step(4)
        zombie = job.agents[2]
        assert zombie.relay
        zombie.relay.open.clear()
        job.agents.pop()
        await job.new_epoch(ranks=3)
        step = job.committed
        await job.until_step(step + 5)
        zombie.relay.open.set()
        zombie.relay._target = job.coordinator
        await job.until(lambda: "epoch 1 is not 2" in zombie.member.refused)
        await job.until_end()
        await zombie.die()
        assert job.undisturbed
        assert job.redone <= 1
        assert {plan.incarnation.epoch for plan in job.agents[0].plans[1:]} == {2}


async def test_rescaling_moves_only_the_layers_whose_owner_changes(memory: Path) -> None:
    async with running(memory, ranks=4, last_step=40) as job:
        for ranks, at_step in [(2, 6), (3, 12), (4, 18), (1, 24), (4, 30)]:
            await job.until_step(at_step)
            held_by = {layer: rank for rank, layers in enumerate(job.layers_of) for layer in layers}
            travelled = sum(fetched(job))
            await job.new_epoch(ranks)
            await job.until_step(job.committed + 3)
            moved = [layer for rank, layers in enumerate(job.layers_of) for layer in layers if held_by[layer] != rank]
            assert sum(fetched(job)) - travelled <= len(moved) * PIECE_BYTES
            await job.dismiss()
        job.agents[0].crash_worker()
        await job.until_end()
        assert job.undisturbed
        assert job.redone <= 1
