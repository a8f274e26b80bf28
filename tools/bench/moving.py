"""How fast layers move between agents with nothing beside it: what a rescale's rate can be at most on this machine.

Agents are processes with the real server, client and slots; each of the receivers has a sender of its own.
"""

import asyncio
import multiprocessing
import shutil
import statistics
import tempfile
import time
from contextlib import ExitStack
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path

from pipelinejob_worker.recovery.agreement import Fetch
from pipelinejob_worker.recovery.copies import PieceClient
from pipelinejob_worker.recovery.piece_server import PieceServer
from pipelinejob_worker.recovery.pieces import Held, Incarnation, Piece
from pipelinejob_worker.recovery.slots import SlotStore
from pipelinejob_worker.recovery.transport import Address

LAYERS, RUNS = 6, 5
JOB, HOST, SENDER = "bench", "127.0.0.1", 1
INCARNATION = Incarnation(1, 1)
MEMORY = Path("/dev/shm")  # noqa: S108 - memory is what is measured


def measure(receivers: int, layer_bytes: int) -> float:
    """Return the bytes a second that ``receivers`` get together; the median of some runs."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(receivers)
    with ExitStack() as stack:
        told = []
        for _ in range(receivers):
            directory = Path(tempfile.mkdtemp(dir=MEMORY))
            stack.callback(shutil.rmtree, directory)
            ports, senders_port = context.Pipe(duplex=False)
            seconds, receivers_seconds = context.Pipe(duplex=False)
            sender = context.Process(target=_send, args=(directory, layer_bytes, senders_port))
            sender.start()
            stack.callback(sender.join)
            stack.callback(sender.kill)
            arguments = (directory, layer_bytes, ports.recv(), barrier, receivers_seconds)
            receiver = context.Process(target=_receive, args=arguments)
            receiver.start()
            stack.callback(receiver.join)
            told.append(seconds)
        slowest: list[float] = [max(end.recv() for end in told) for _ in range(RUNS)]
    return receivers * LAYERS * layer_bytes / statistics.median(slowest)


def _held(layer_bytes: int) -> list[Held]:
    return [
        Held(piece=Piece(layer, 0, 1), step=1, written=INCARNATION, size=layer_bytes, layers=LAYERS, copied=False)
        for layer in range(LAYERS)
    ]


def _store(directory: Path, layer_bytes: int) -> SlotStore:
    return SlotStore(directory, JOB, 2 * LAYERS * layer_bytes)


def _send(directory: Path, layer_bytes: int, port: Connection) -> None:
    async def serve() -> None:
        store = _store(directory / "sender", layer_bytes)
        held = _held(layer_bytes)
        store.reserve({each.piece: each.size for each in held}, copied=False, slots=1)
        for each in held:
            store.begin(each).commit()
        server = PieceServer(store, JOB)
        bound = server.start(HOST)
        await server.advance(INCARNATION)
        port.send(bound)
        await asyncio.Event().wait()

    asyncio.run(serve())


def _receive(directory: Path, layer_bytes: int, port: int, barrier: Barrier, told: Connection) -> None:
    fetches = [Fetch(held=held, source=SENDER) for held in _held(layer_bytes)]
    for run in range(RUNS):
        place = directory / f"receiver-{run}"
        client = PieceClient(_store(place, layer_bytes), JOB, rank=0)
        barrier.wait()
        begun = time.perf_counter()
        asyncio.run(client.fetch({SENDER: Address(HOST, port)}, INCARNATION, fetches))
        told.send(time.perf_counter() - begun)
        shutil.rmtree(place)
