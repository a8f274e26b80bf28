"""Programs of the test bed: found again, and ended only while they are what they were."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.cluster import commands, processes
from tests.cluster.errors import ClusterError
from tests.cluster.processes import Program


def sleeper(home: Path, *argv: str) -> Program:
    return Program(home, "sleeper", argv or ("sleep", "600"), lambda: True)


@pytest.fixture
def home(tmp_path: Path):
    yield tmp_path
    processes.kill_all(lambda: processes.marked(tmp_path))


def test_another_object_finds_the_program_and_starts_it_once(home: Path) -> None:
    sleeper(home).start()
    first = sleeper(home).pid
    sleeper(home).start()
    assert first and sleeper(home).pid == first

    sleeper(home).stop()
    assert sleeper(home).pid is None and not processes.running(first)


def test_a_reused_process_id_is_not_touched(home: Path) -> None:
    stranger = subprocess.Popen(["sleep", "600"])
    try:
        (home / "pids").mkdir()
        (home / "pids" / "sleeper").write_text(str(stranger.pid))
        assert sleeper(home).pid is None
        sleeper(home).stop()
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_program_that_ends_at_once_shows_the_end_of_its_log(home: Path) -> None:
    failing = Program(home, "failing", ("sh", "-c", "echo no disk; exit 3"), lambda: False)
    with pytest.raises(ClusterError, match=r"failing ended at once; the end of .*failing\.log:\n +no disk"):
        failing.start()


def test_a_program_that_never_answers_is_named(home: Path) -> None:
    silent = Program(home, "silent", ("sleep", "600"), lambda: False)
    with pytest.raises(ClusterError, match="silent answers: not within 0 s"):
        silent.start(seconds=0.2)


def test_a_program_that_is_deaf_to_the_signal_is_killed(home: Path) -> None:
    deaf = sleeper(home, "sh", "-c", "trap '' TERM; while :; do sleep 0.1; done")
    deaf.launch()
    pid = deaf.pid
    assert pid is not None
    processes.end([pid], seconds=0.5)
    assert not processes.running(pid)


def test_what_a_program_left_running_is_found_by_its_mark(home: Path) -> None:
    parent = sleeper(home, "sh", "-c", "sleep 600 & wait")
    parent.launch()
    commands.wait_until("the child runs", lambda: len(processes.marked(home)) == 2, seconds=5)
    parent.stop(signal.SIGKILL)
    assert len(processes.marked(home)) == 1
    assert processes.marked(home, {"another"}) == []

    processes.kill_all(lambda: processes.marked(home))
    assert processes.marked(home) == []


def test_the_caller_itself_is_never_among_the_found(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(processes.HOME_MARK, str(home))
    assert os.getpid() not in processes.marked(home)


def test_a_missing_program_is_named(home: Path) -> None:
    with pytest.raises(ClusterError, match="no-such-program: no such program"):
        sleeper(home, "no-such-program").start()
