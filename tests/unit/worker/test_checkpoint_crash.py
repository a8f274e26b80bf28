"""A process that is killed while it saves, at whichever point, leaves a checkpoint to go on from."""

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.unit.worker import forked
from tests.unit.worker.checkpoints import Job, read, same, save, store

_CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def _exit_code(work: Callable[[], None]) -> int:
    """How a fork of this process ends that does ``work``; a signal is negative."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _save_20(volume: Path) -> None:
    checkpoints = store(volume)
    save(checkpoints, 20)
    checkpoints.retain(1)


def _check_and_go_on(volume: Path) -> int:
    """Resume as the next attempt, which must save as if nothing had happened; return the step resumed from."""
    left = store(volume)
    assert all(same(read(left, step), step) for step in left.complete_steps()), "what looks complete is complete"
    job = Job(volume, stages=1, attempt=1, keep=1)
    (step,) = {resumed.step for resumed in job.resumed}
    assert step in (10, 20)
    assert all(same(resumed.layers, step) and not resumed.problem for resumed in job.resumed)
    job.save(20)
    assert (job.saved_step, job.problem) == (20, "")
    assert sorted(path.name for path in volume.iterdir() if path.suffix != ".new") == ["latest", "step-000000020"]
    return step


def _crash_before_each_change(directory: Path) -> list[int]:
    resumed = []
    code = -signal.SIGKILL
    while code == -signal.SIGKILL:
        number = len(resumed)
        volume = directory / str(number)
        volume.mkdir()
        save(store(volume), 10)

        def work(volume: Path = volume, number: int = number) -> None:
            changes = 0

            def kill_before_change(event: str, _: tuple[Any, ...]) -> None:
                nonlocal changes
                if event in _CHANGES:
                    if changes == number:
                        os.kill(os.getpid(), signal.SIGKILL)
                    changes += 1

            sys.addaudithook(kill_before_change)
            _save_20(volume)

        code = _exit_code(work)
        resumed.append(_check_and_go_on(volume))
    assert code == 0
    return resumed


def test_a_kill_before_any_change_of_the_volume_leaves_the_checkpoint_before_or_the_new_one(tmp_path: Path) -> None:
    resumed = forked.call(_crash_before_each_change, tmp_path)
    assert len(resumed) > 20
    assert resumed == sorted(resumed), "before some point it is the one before, after it the new one"
    assert {10, 20} == set(resumed)


def _crash_in_writes(directory: Path) -> list[tuple[int, int]]:
    seen = []
    for limit in (0, 1, 64, 500, 800, 1 << 20):
        volume = directory / str(limit)
        volume.mkdir()
        save(store(volume), 10)

        def work(volume: Path = volume, limit: int = limit) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel kills whoever writes beyond the limit
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            _save_20(volume)

        seen.append((_exit_code(work), _check_and_go_on(volume)))
    return seen


def test_a_kill_in_the_middle_of_a_write_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    killed = (-signal.SIGXFSZ, 10)
    assert forked.call(_crash_in_writes, tmp_path) == [killed, killed, killed, killed, killed, (0, 20)]
