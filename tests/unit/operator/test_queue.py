"""The work queue, with a clock that the test turns."""

import asyncio

import pytest

from pipelinejob_operator.runtime.queue import WorkQueue


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(clock: Clock) -> WorkQueue[str]:
    return WorkQueue(clock, jitter=lambda: 0.0)


async def test_keys_come_out_in_order_and_once(queue: WorkQueue[str], clock: Clock) -> None:
    for key in ("a", "b", "a"):
        queue.add(key)
    clock.now += 3
    assert [await queue.take(), await queue.take()] == [("a", 3.0), ("b", 3.0)]
    assert len(queue) == 0


async def test_a_key_in_work_is_not_handed_out_twice_but_again_afterwards(queue: WorkQueue[str]) -> None:
    queue.add("a")
    await queue.take()
    queue.add("a")
    queue.add("a")
    assert len(queue) == 0
    queue.done("a")
    assert len(queue) == 1
    await queue.take()
    queue.done("a")
    assert len(queue) == 0


async def test_a_delayed_key_waits_for_its_time(queue: WorkQueue[str], clock: Clock) -> None:
    queue.add_after("a", 5)
    clock.now += 4.9
    assert (len(queue), queue.delayed) == (0, 1)
    clock.now += 0.2
    assert (len(queue), queue.delayed) == (1, 0)


async def test_of_two_times_the_earlier_holds(queue: WorkQueue[str], clock: Clock) -> None:
    queue.add_after("a", 5)
    queue.add_after("a", 60)
    queue.add_after("b", 60)
    queue.add_after("b", 5)
    clock.now += 5
    assert len(queue) == 2
    assert {(await queue.take())[0], (await queue.take())[0]} == {"a", "b"}
    queue.done("a")
    queue.done("b")
    clock.now += 60
    assert len(queue) == 0


async def test_an_event_does_not_wait_for_a_delay(queue: WorkQueue[str], clock: Clock) -> None:
    queue.add_after("a", 60)
    queue.add("a")
    await queue.take()
    queue.done("a")
    clock.now += 60
    assert len(queue) == 0, "the delay was overtaken"


async def test_a_delay_that_ends_while_the_key_is_in_work_is_not_lost(queue: WorkQueue[str], clock: Clock) -> None:
    queue.add("a")
    await queue.take()
    queue.add_after("a", 5)
    clock.now += 5
    assert len(queue) == 0
    queue.done("a")
    assert len(queue) == 1


async def test_retries_back_off_and_success_resets_them(queue: WorkQueue[str]) -> None:
    assert [queue.retry("a") for _ in range(10)] == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2, 60.0]
    assert queue.retry("b") == 0.2
    queue.forget("a")
    assert queue.retry("a") == 0.2


async def test_jitter_makes_retries_later_never_earlier(clock: Clock) -> None:
    queue: WorkQueue[str] = WorkQueue(clock, jitter=lambda: 1.0)
    assert queue.retry("a") == pytest.approx(0.24)


async def test_a_waiting_worker_is_woken_by_a_key(queue: WorkQueue[str]) -> None:
    worker = asyncio.create_task(queue.take())
    await asyncio.sleep(0)
    queue.add("a")
    assert await asyncio.wait_for(worker, 5) == ("a", 0.0)


async def test_a_waiting_worker_is_woken_by_a_time_nearer_than_the_one_it_waits_for() -> None:
    loop = asyncio.get_running_loop()
    queue: WorkQueue[str] = WorkQueue(loop.time, jitter=lambda: 0.0)
    queue.add_after("late", 600)
    worker = asyncio.create_task(queue.take())
    await asyncio.sleep(0)
    queue.add_after("soon", 0.01)
    assert (await asyncio.wait_for(worker, 5))[0] == "soon"
