"""Long-running programs: started away from the terminal, found again later, ended by their process id.

Every program carries its home and its name in its environment. A process id is acted upon only while the
process behind it still carries them, so that a reused id never hits a stranger, and whatever a crash left
behind can be found.
"""

import os
import shutil
import signal
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster import commands
from tests.cluster.errors import ClusterError

HOME_MARK = "PIPELINEJOB_CLUSTER_HOME"
NAME_MARK = "PIPELINEJOB_CLUSTER_PROCESS"
STOP_SECONDS = 20
POLL_SECONDS = 0.02


def marks(home: Path, name: str) -> dict[str, str]:
    """Return the variables by which a program of a home is known."""
    return {HOME_MARK: str(home), NAME_MARK: name}


def _carries(pid: int, *variables: str) -> bool:
    try:
        carried = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False
    return all(variable.encode() in carried for variable in variables)


def running(pid: int) -> bool:
    """Say whether a process exists and has not ended. One of our own children that has ended is reaped."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        threads = sum(1 for _ in Path(f"/proc/{pid}/task").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return False
    if state not in "ZX" or threads > 1:  # the first thread may end before the others
        return True
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    return False


def marked(home: Path, names: Collection[str] = ()) -> list[int]:
    """Return the programs of a home, or those with these names, and whatever of their children carries the mark."""
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    home_mark, name_marks = f"{HOME_MARK}={home}", [f"{NAME_MARK}={name}" for name in names]
    return [
        pid
        for pid in pids
        if pid != os.getpid()
        and _carries(pid, home_mark)
        and (not names or any(_carries(pid, mark) for mark in name_marks))
        and running(pid)
    ]


def kill_all(find: Callable[[], Collection[int]], seconds: float = STOP_SECONDS) -> None:
    """Kill what ``find`` returns until it returns nothing: processes may start others before they die."""
    end_at, killed = time.monotonic() + seconds, set[int]()
    while left := find():
        killed.update(left)
        if time.monotonic() > end_at:
            raise ClusterError(f"processes {sorted(left)} do not die; look at them with `ps`")
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
    # A dying process carries no mark any more, and may still hold what it had.
    while left := {pid for pid in killed if running(pid)}:
        if time.monotonic() > end_at:
            raise ClusterError(f"processes {sorted(left)} do not die; look at them with `ps`")
        time.sleep(POLL_SECONDS)


def end(pids: Iterable[int], *, first: signal.Signals = signal.SIGTERM, seconds: float = STOP_SECONDS) -> None:
    """End processes: ask first, kill what is still there after ``seconds``, wait until all are gone."""
    left = list(pids)
    for sign, patience in ((first, seconds), (signal.SIGKILL, STOP_SECONDS)):
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, sign)
        deadline = time.monotonic() + patience
        while left := [pid for pid in left if running(pid)]:
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS)
        else:
            return
    raise ClusterError(f"processes {left} do not end; look at them with `ps`")


def _pid_file(home: Path, name: str) -> Path:
    return home / "pids" / name


def pid_of(home: Path, name: str) -> int | None:
    """Return the process id of a program, while it runs."""
    with suppress(FileNotFoundError, ValueError):
        pid = int(_pid_file(home, name).read_text())
        if _carries(pid, f"{HOME_MARK}={home}", f"{NAME_MARK}={name}") and running(pid):
            return pid
    return None


def stop(home: Path, name: str, first: signal.Signals = signal.SIGTERM) -> None:
    """End a program, if it runs, and wait until it is gone."""
    if pid := pid_of(home, name):
        end([pid], first=first)
    _pid_file(home, name).unlink(missing_ok=True)


@dataclass(frozen=True)
class Program:
    """A program of the test bed. The object holds no state: another run of Python finds the same process.

    ``ready`` says whether it answers; ``start`` waits for it.
    """

    home: Path
    name: str
    argv: tuple[str | Path, ...]
    ready: Callable[[], bool]
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        """Its output, appended over restarts."""
        return self.home / "log" / f"{self.name}.log"

    @property
    def pid(self) -> int | None:
        """Its process id, while it runs."""
        return pid_of(self.home, self.name)

    def launch(self) -> None:
        """Start it when it does not run, without waiting."""
        if self.pid:
            return
        pid_file = _pid_file(self.home, self.name)
        for file in (self.log, pid_file):
            file.parent.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            **self.environment,
            **marks(self.home, self.name),
        }
        program = shutil.which(str(self.argv[0]))
        if program is None:
            raise ClusterError(f"{self.argv[0]}: no such program; run `make cluster-down`, then again")
        append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        pid = os.posix_spawn(
            program,
            [str(word) for word in self.argv],
            environment,
            setsid=True,  # an interrupt at the terminal is for the command, not for the cluster
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(self.log), append, 0o644),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
        )
        # Between the spawn and the program's first instruction its environment reads empty.
        commands.wait_until(
            f"{self.name} starts", lambda: _carries(pid, f"{NAME_MARK}={self.name}") or not running(pid)
        )
        pid_file.write_text(str(pid))

    def wait(self, seconds: float = 60) -> None:
        """Wait until it answers.

        Raises:
            ClusterError: it ended, or did not answer in time; the message ends with the end of its log.

        """

        def look() -> bool:
            # Not ``pid``: wrappers such as nsenter exec, and for a moment the marks cannot be read.
            if not running(int(_pid_file(self.home, self.name).read_text())):
                raise ClusterError(f"{self.name} ended at once; {commands.tail(self.log)}")
            return self.ready()

        commands.wait_until(f"{self.name} answers", look, seconds=seconds, log=self.log)

    def start(self, seconds: float = 60) -> None:
        """Start it when it does not run, and wait until it answers."""
        self.launch()
        self.wait(seconds)

    def stop(self, first: signal.Signals = signal.SIGTERM) -> None:
        """End it and wait until it is gone; ``first=signal.SIGKILL`` is a crash."""
        stop(self.home, self.name, first)
