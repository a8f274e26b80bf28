"""How fast new memory comes on this machine: what everything that moves layers is bound by.

A hypervisor that takes a guest's unused memory back (free page reporting of virtio-balloon does so within seconds) has
to find each page again at its first touch. Memory is called warm when it has just been given back by another process.
"""

import mmap
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

GIGABYTE = 1 << 30
TOUCHED_GIGABYTES = 8
_MADV_POPULATE_WRITE = 23


def first_touch() -> dict[str, int]:
    """Return the megabytes a second at which one process gets new memory: as the machine has it, and warm."""
    with held(TOUCHED_GIGABYTES) as memory:
        cold = memory.megabytes_per_second
    with held(1) as memory:
        return {"as_found": cold, "warm": memory.megabytes_per_second}


class Held:
    """Memory that another process has taken, and keeps from going cold."""

    def __init__(self, process: SpawnProcess, end: Connection) -> None:
        self._process, self._end = process, end
        self.megabytes_per_second: int = end.recv()

    def give_back(self) -> None:
        """Have it free and, for a few seconds, warm."""
        self._end.close()
        self._process.join()


@contextmanager
def held(gigabytes: int) -> Iterator[Held]:
    """Take memory in a process of its own; it is given back at the end, or before."""
    context = multiprocessing.get_context("spawn")
    ours, its = context.Pipe()
    process = context.Process(target=_take, args=(gigabytes, its))
    process.start()
    its.close()
    memory = Held(process, ours)
    try:
        yield memory
    finally:
        memory.give_back()


def _take(gigabytes: int, end: Connection) -> None:
    begun = time.perf_counter()
    memory = mmap.mmap(-1, gigabytes * GIGABYTE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(_MADV_POPULATE_WRITE)
    end.send(round(gigabytes * GIGABYTE / 1e6 / (time.perf_counter() - begun)))
    with suppress(EOFError):
        end.recv()
