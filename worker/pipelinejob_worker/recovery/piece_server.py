"""Keeps copies for the ranks that this one guards, and gives pieces to those who recover, over TCP.

Payloads go straight between the sockets and the slots' memory.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import structlog
from pydantic import ValidationError

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.recovery.pieces import NEVER, Incarnation, Piece
from pipelinejob_worker.recovery.requests import (
    REQUEST,
    Answer,
    Doubt,
    Get,
    Greeting,
    Put,
    Request,
    Reserve,
)
from pipelinejob_worker.recovery.slots import SlotDamagedError, SlotMissingError, SlotStore
from pipelinejob_worker.recovery.transport import (
    STALL_SECONDS,
    Acceptor,
    Connection,
    Traffic,
    TransferError,
    cancel,
)

log = structlog.get_logger()


class PieceServer:
    """Keeps copies for the ranks that this one guards, and gives pieces to those who recover.

    Only members of this job and of the present incarnation are served.
    """

    def __init__(self, store: SlotStore, job_uid: str, stored: Callable[[], object] = lambda: None) -> None:
        """``stored`` is called after each copy that has come."""
        self._store = store
        self._job_uid = job_uid
        self._stored = stored
        self._incarnation = NEVER
        self._advanced = asyncio.Condition()
        self._served: dict[asyncio.Task[None], Incarnation] = {}
        """Connections, by the incarnation that they have been accepted for."""
        self._writers: dict[Piece, asyncio.Task[None]] = {}
        self.reserved: set[Piece] = set()
        """Pieces whose copies are kept in the present incarnation."""

        self._acceptor = Acceptor(self._serve)
        self.traffic = Traffic()

    @property
    def connections(self) -> int:
        """How many are served."""
        return self._acceptor.connections

    def start(self, host: str, port: int = 0) -> int:
        """Listen; return the port. Raises OSError."""
        return self._acceptor.start(host, port)

    async def advance(self, incarnation: Incarnation) -> None:
        """Serve this incarnation from now on; transfers of older ones are cut off when this returns."""
        async with self._advanced:
            if incarnation > self._incarnation:
                self._incarnation = incarnation
                self.reserved.clear()
            self._advanced.notify_all()
        await cancel(task for task, served in self._served.items() if served < self._incarnation)

    async def stop(self) -> None:
        """Stop listening, and cut off all transfers."""
        await self._acceptor.stop()

    async def _serve(self, accepted: socket.socket) -> None:
        connection, task = Connection(accepted, self.traffic), asyncio.current_task()
        assert task
        try:
            if not (data := await connection.receive()):
                return
            greeting = Greeting.model_validate_json(data)
            if refusal := await self._refusal(greeting):
                log.warning("transfer refused", rank=greeting.rank, reason=refusal)
                await connection.send(Answer(result="refused", reason=refusal))
                return
            self._served[task] = greeting.incarnation
            await connection.send(Answer(result="done"))
            while data := await connection.receive(idle=True):
                await self._answer(connection, REQUEST.validate_json(data))
        except (OSError, TimeoutError, TransferError, ValidationError) as error:
            log.warning("transfer cut off", error=str(error) or type(error).__name__)
        finally:
            self._served.pop(task, None)

    async def _refusal(self, greeting: Greeting) -> str:
        """Why not to serve; a client that has heard of a new incarnation first is let wait for it."""
        if greeting.job_uid != self._job_uid:
            return f"job {greeting.job_uid} is not job {self._job_uid}"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STALL_SECONDS / 2), self._advanced:
                await self._advanced.wait_for(lambda: self._incarnation >= greeting.incarnation)
        if greeting.incarnation != self._incarnation:
            return f"incarnation {greeting.incarnation} is not {self._incarnation}"
        return ""

    async def _answer(self, connection: Connection, request: Request) -> None:
        try:
            match request:
                case Reserve(pieces=pieces):
                    sizes = {sized.piece: sized.size for sized in pieces}
                    self.reserved |= sizes.keys()  # first: whoever gives up other pieces must not take these for such
                    await asyncio.to_thread(self._store.reserve, sizes, copied=True)
                    await connection.send(Answer(result="done"))
                case Put():
                    await self._take(connection, request)
                case Get():
                    await self._give(connection, request)
                case Doubt(piece=piece, step=step, copied=copied):
                    await asyncio.to_thread(self._store.read, piece, step, copied=copied)
                    await connection.send(Answer(result="done"))
        except (SlotMissingError, SlotDamagedError, ConfigurationError, ValueError, OSError) as error:
            if isinstance(error, ConnectionError):
                raise
            await connection.send(Answer(result="refused", reason=str(error)[:1024]))

    async def _take(self, connection: Connection, put: Put) -> None:
        held = put.held.model_copy(update={"copied": True})
        if self._store.holds(held):
            await connection.send(Answer(result="held"))
            return
        async with self._sole_writer(held.piece):
            writing = self._store.begin(held)
            await connection.send(Answer(result="accepted"))
            checksum = await connection.receive_payload(writing.payload)
            if checksum != put.checksum:
                raise SlotDamagedError(f"piece {held.piece} of step {held.step} has changed on its way")
            writing.commit(checksum)
        self._stored()
        await connection.send(Answer(result="done"))

    @asynccontextmanager
    async def _sole_writer(self, piece: Piece) -> AsyncIterator[None]:
        """Cut off an older connection that still fills a slot of the piece: its sender has begun again."""
        task = asyncio.current_task()
        assert task
        if piece in self._writers:
            await cancel([self._writers[piece]])
        self._writers[piece] = task
        try:
            yield
        finally:
            if self._writers.get(piece) is task:
                del self._writers[piece]

    async def _give(self, connection: Connection, get: Get) -> None:
        payload, checksum = self._store.find(get.held)
        await connection.send(Answer(result="found", size=len(payload), checksum=checksum))
        await connection.send_payload(payload)
