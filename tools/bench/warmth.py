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

from pipelinejob_worker.recovery.pages import MADV_POPULATE_WRITE

GIGABYTE = 1 << 30
TOUCHED_GIGABYTES = 8


def first_touch() -> dict[str, int]:
    """Return the megabytes a second at which one process gets new memory: as the machine has it, and warm."""
    with held(TOUCHED_GIGABYTES) as as_found:
        pass
    with held(1) as warm:
        return {"as_found": as_found, "warm": warm}


@contextmanager
def held(gigabytes: int) -> Iterator[int]:
    """Have a process hold memory, which is free and warm afterwards; yields at how many megabytes a second it came."""
    context = multiprocessing.get_context("spawn")
    ours, its = context.Pipe()
    process = context.Process(target=_take, args=(gigabytes, its))
    process.start()
    its.close()
    try:
        yield ours.recv()
    finally:
        ours.close()
        process.join()


def _take(gigabytes: int, end: Connection) -> None:
    begun = time.perf_counter()
    memory = mmap.mmap(-1, gigabytes * GIGABYTE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(MADV_POPULATE_WRITE)
    end.send(round(gigabytes * GIGABYTE / 1e6 / (time.perf_counter() - begun)))
    with suppress(EOFError):
        end.recv()
