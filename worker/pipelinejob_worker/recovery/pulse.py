"""Signs of life of a worker, in memory that its agent sees, and the agent's order to leave the group.

A thread stamps the time: if the stamp is old, the process is stopped or holds Python's interpreter lock. The main
thread stamps it at every pass and says what it does: if that stamp is old although the process lives, the main thread
hangs, or waits for others. The thread also obeys the order to leave, as the main thread may be blocked.
"""

import mmap
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Self

BEAT_SECONDS = 0.02

_BEAT, _MOVED, _DOING, _LEAVE = range(4)
_SIZE = 32


class LeaveError(Exception):
    """The agent has ordered to leave the group."""


class Doing(IntEnum):
    """What the main thread does."""

    STARTING = 0
    COMPUTING = 1
    WAITING = 2
    """For other ranks."""


@dataclass(frozen=True)
class Signs:
    """Seconds since the process lived and since its main thread moved, and what that does."""

    beat_age: float
    moved_age: float
    doing: Doing


class Pulse:
    """The shared memory. Times are of the monotonic clock, which all processes of a machine share.

    Each value is one machine word, so that nobody reads half of it. (``struct.pack_into`` would clear it first: who
    reads then takes a worker for one that has not moved since the machine was started.)
    """

    def __init__(self, memory: mmap.mmap) -> None:
        self._words = memoryview(memory).cast("Q")

    @classmethod
    def create(cls, path: Path) -> Self:
        """Make the memory for a new worker; a worker before it, that may still run, keeps its own. Raises OSError."""
        new = path.with_name(f".{path.name}")
        new.write_bytes(bytes(_SIZE))
        new.replace(path)
        pulse = cls.open(path)
        pulse._stamp(_BEAT)
        pulse._stamp(_MOVED)
        return pulse

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open what the agent has made. Raises OSError."""
        descriptor = os.open(path, os.O_RDWR)
        try:
            return cls(mmap.mmap(descriptor, _SIZE))
        finally:
            os.close(descriptor)

    def beat(self) -> None:
        """Say that the process lives."""
        self._stamp(_BEAT)

    def move(self, doing: Doing) -> None:
        """Say that the main thread begins something else.

        Raises LeaveError if the agent has ordered to leave: what gloo is asked to do after its sockets have been shut
        down can wait for ever.
        """
        if self.must_leave:
            raise LeaveError("the agent has ordered to leave the group")
        self._stamp(_MOVED)  # first: who sees what is done now sees the time, too
        self._words[_DOING] = doing

    def order_to_leave(self) -> None:
        """Have the worker leave its group."""
        self._words[_LEAVE] = 1

    @property
    def must_leave(self) -> bool:
        """Whether the agent has ordered to leave the group."""
        return self._words[_LEAVE] != 0

    def signs(self) -> Signs:
        """Return how long ago the worker gave its signs of life."""
        doing = Doing(self._words[_DOING])
        moved, beat = self._words[_MOVED], self._words[_BEAT]
        now = time.monotonic_ns()  # read last: no stamp is in the future
        return Signs((now - beat) / 1e9, (now - moved) / 1e9, doing)

    def _stamp(self, word: int) -> None:
        self._words[word] = time.monotonic_ns()


class Heart:
    """The worker's thread that beats, and calls ``leave`` when the agent has ordered to."""

    def __init__(self, pulse: Pulse, leave: Callable[[], object]) -> None:
        """``leave`` is called again and again until ``stop``: a group that is being formed opens further sockets."""
        self._pulse = pulse
        self._leave = leave
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heart", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; the main thread has left the group by itself."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            self._pulse.beat()
            if self._pulse.must_leave:
                self._leave()


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal or a debugger; False if there is none of that number."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state in ("T", "t")
