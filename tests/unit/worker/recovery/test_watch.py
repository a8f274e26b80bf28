"""What an agent makes of its worker's signs of life."""

import asyncio
import os
from pathlib import Path

import pytest

from pipelinejob_worker.agent.watch import Watch
from pipelinejob_worker.recovery.deadlines import SERVING_DEADLINE, UNMEASURED_STEP_DEADLINE
from pipelinejob_worker.recovery.pulse import BEAT_SECONDS, Doing, Pulse

HANG_SECONDS = 0.3


@pytest.fixture
def pulse(tmp_path: Path) -> Pulse:
    return Pulse.create(tmp_path / "pulse")


@pytest.mark.parametrize(("configured", "serving"), [(0, SERVING_DEADLINE), (7, 7)])
def test_a_stage_that_serves_has_a_deadline_before_anything_is_measured(
    pulse: Pulse, configured: float, serving: float
) -> None:
    watch = Watch(pulse, os.getpid(), configured)
    assert watch.deadline == UNMEASURED_STEP_DEADLINE
    watch.serving()
    assert watch.deadline == serving


async def test_a_main_thread_that_hangs_while_the_process_lives_is_found_once_it_serves(pulse: Pulse) -> None:
    watch, verdicts = Watch(pulse, os.getpid(), HANG_SECONDS), asyncio.Queue[str]()

    async def live() -> None:
        while True:
            pulse.beat()
            await asyncio.sleep(BEAT_SECONDS)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(live()), group.create_task(watch.run(verdicts.put_nowait))]
        pulse.move(Doing.COMPUTING)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(verdicts.get(), 2 * HANG_SECONDS)
        watch.serving()
        assert await asyncio.wait_for(verdicts.get(), 10) == "Hung"
        for task in tasks:
            task.cancel()
