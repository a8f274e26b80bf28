"""Small pieces in real slots."""

import asyncio
import random
import time
from collections.abc import Callable
from pathlib import Path

from pipelinejob_worker.recovery.pieces import Held, Incarnation, Piece
from pipelinejob_worker.recovery.slots import SlotStore

FIRST = Incarnation(1, 1)
SECOND = Incarnation(1, 2)
LIMIT = 1 << 30


def store_in(directory: Path, job_uid: str = "uid-1", limit_bytes: int = LIMIT) -> SlotStore:
    return SlotStore(directory, job_uid, limit_bytes)


def held(layer: int, step: int, written: Incarnation = FIRST, *, size: int = 1000, copied: bool = False) -> Held:
    return Held(piece=Piece(layer), step=step, written=written, size=size, layers=4, copied=copied)


def content(what: Held) -> bytes:
    """Bytes that belong to one piece, step and incarnation."""
    return random.Random(f"{what.piece} {what.step} {what.written}").randbytes(what.size)


def write(store: SlotStore, what: Held) -> None:
    writing = store.begin(what)
    writing.payload[:] = content(what)
    writing.commit()


def filled(directory: Path, *wanted: Held) -> SlotStore:
    """A store with these pieces, and slots for them."""
    store = store_in(directory)
    for copied in (False, True):
        store.reserve({each.piece: each.size for each in wanted if each.copied == copied}, copied=copied)
    for each in wanted:
        write(store, each)
    return store


def bytes_of(store: SlotStore, what: Held) -> bytes:
    payload, _ = store.read(what.piece, what.step, copied=what.copied)
    return bytes(payload)


async def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.005)
