"""Signs of life: a stopped process, a hung main thread and a wait for others look different."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelinejob_worker.recovery.deadlines import Punctual, judge
from pipelinejob_worker.recovery.pulse import Doing, Heart, LeaveError, Pulse, Signs, is_stopped
from tests.unit.worker import forked
from tests.unit.worker.agents import until


def _worker(path: Path, doing: Doing, port: int) -> None:
    """Beat; hang in the main thread until told to leave, then say so."""
    pulse = Pulse.open(path)
    with socket.create_connection(("127.0.0.1", port)) as report:
        left = threading.Event()
        heart = Heart(pulse, left.set)
        pulse.move(doing)
        report.sendall(str(os.getpid()).encode())
        left.wait()  # as blocked as one can be: only the heart's thread moves
        heart.stop()
        report.sendall(b"left")


@pytest.mark.parametrize("doing", [Doing.COMPUTING, Doing.WAITING])
def test_a_worker_is_judged_from_outside(tmp_path: Path, doing: Doing) -> None:
    pulse = Pulse.create(tmp_path / "pulse")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(
            target=forked.call, args=(_worker, tmp_path / "pulse", doing, listener.getsockname()[1])
        )
        thread.start()
        report, _ = listener.accept()
        with report:
            pid = int(report.recv(16))
            until(lambda: pulse.signs().moved_age > 0.1)
            signs = pulse.signs()
            assert signs.beat_age < 5
            assert signs.doing == doing
            assert judge(signs, 0.05, stopped=is_stopped(pid)) == ("Hung" if doing == Doing.COMPUTING else "Stuck")

            os.kill(pid, signal.SIGSTOP)
            until(lambda: judge(pulse.signs(), 60, stopped=is_stopped(pid)) == "Stopped")
            assert pulse.signs().beat_age > 0.5
            os.kill(pid, signal.SIGCONT)
            until(lambda: judge(pulse.signs(), 60, stopped=is_stopped(pid)) is None)

            pulse.order_to_leave()
            assert report.recv(16) == b"left"
        thread.join()


def test_a_new_worker_has_a_pulse_of_its_own(tmp_path: Path) -> None:
    old = Pulse.create(tmp_path / "pulse")
    zombie = Pulse.open(tmp_path / "pulse")
    old.order_to_leave()
    new = Pulse.create(tmp_path / "pulse")
    with pytest.raises(LeaveError):
        zombie.move(Doing.WAITING)
    new.move(Doing.STARTING)
    assert new.signs().doing == Doing.STARTING


def test_no_process_is_not_a_stopped_one() -> None:
    assert not is_stopped(2**22)
    assert not is_stopped(os.getpid())


@pytest.mark.parametrize(
    ("signs", "stopped", "verdict"),
    [
        (Signs(0.1, 1, Doing.COMPUTING), False, None),
        (Signs(0.4, 1, Doing.COMPUTING), True, None),
        (Signs(0.6, 1, Doing.COMPUTING), True, "Stopped"),
        (Signs(4.9, 1, Doing.COMPUTING), False, None),
        (Signs(5.1, 1, Doing.WAITING), False, "Silent"),
        (Signs(0.1, 10.1, Doing.COMPUTING), False, "Hung"),
        (Signs(0.1, 10.1, Doing.WAITING), False, None),
        (Signs(0.1, 15.1, Doing.WAITING), False, "Stuck"),
        (Signs(0.1, 599, Doing.STARTING), False, None),
        (Signs(0.1, 601, Doing.STARTING), False, "Hung"),
    ],
)
def test_verdicts_with_a_step_deadline_of_ten_seconds(signs: Signs, stopped: bool, verdict: str | None) -> None:
    assert judge(signs, 10, stopped=stopped) == verdict


def test_a_judge_that_is_late_itself_does_not_judge() -> None:
    punctual = Punctual(0.1)
    assert [punctual.fit_to_judge(now) for now in (0.0, 0.1, 0.4, 0.9, 1.0)] == [False, True, True, False, True]


def measure(action: Callable[[], object], times: int) -> float:
    started = time.perf_counter()
    for _ in range(times):
        action()
    return (time.perf_counter() - started) / times


def test_a_sign_of_life_costs_microseconds(tmp_path: Path) -> None:
    pulse = Pulse.create(tmp_path / "pulse")
    assert measure(lambda: pulse.move(Doing.COMPUTING), 10_000) < 50e-6


def _move(path: Path, until_exists: Path) -> None:
    pulse = Pulse.open(path)
    while not until_exists.exists():
        for _ in range(1000):
            pulse.move(Doing.COMPUTING)


def test_a_sign_of_life_is_never_seen_half_written(tmp_path: Path) -> None:
    pulse, end = Pulse.create(tmp_path / "pulse"), tmp_path / "end"
    thread = threading.Thread(target=forked.call, args=(_move, tmp_path / "pulse", end))
    thread.start()
    until(lambda: pulse.signs().doing == Doing.COMPUTING)
    oldest = max(pulse.signs().moved_age for _ in range(300_000))
    end.touch()
    thread.join()
    assert oldest < 5, "a stamp that is cleared before it is written looks as old as the machine"
