"""How fast new memory comes on this machine: what everything that moves layers is bound by.

A hypervisor that takes a guest's unused memory back (free page reporting of virtio-balloon does so within seconds) has
to find each page again at its first touch. Memory is called warm when it has just been given back by another process.
"""

import mmap
import multiprocessing
import time
from multiprocessing.connection import Connection

GIGABYTE = 1 << 30
TOUCHED_GIGABYTES = 8
_MADV_POPULATE_WRITE = 23


def first_touch() -> dict[str, int]:
    """Return the megabytes a second at which one process gets new memory: as the machine has it, and warm."""
    cold = _in_a_process(TOUCHED_GIGABYTES)
    return {"as_found": cold, "warm": _in_a_process(1)}


def warm(gigabytes: int) -> None:
    """Have so much of the free memory warm for the next seconds."""
    _in_a_process(gigabytes)


def _in_a_process(gigabytes: int) -> int:
    """Take memory and give it back by ending; return megabytes a second of taking."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_take, args=(gigabytes, sender))
    process.start()
    process.join()
    rate: int = receiver.recv()
    return rate


def _take(gigabytes: int, tell: Connection) -> None:
    begun = time.perf_counter()
    memory = mmap.mmap(-1, gigabytes * GIGABYTE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(_MADV_POPULATE_WRITE)
    tell.send(round(gigabytes * GIGABYTE / 1e6 / (time.perf_counter() - begun)))
