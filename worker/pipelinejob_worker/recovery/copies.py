"""Pieces from one agent's memory to another's, over TCP: to the guard of a rank, and to whoever recovers.

A connection begins with a ``Greeting`` and its answer. Then the client sends one request after another: ``Reserve``,
``Put`` and, if that is accepted, the payload, ``Get``, ``Doubt``. Payloads go straight between the sockets and the
slots' memory.
"""

import asyncio
import contextlib
import socket
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Literal, NamedTuple, TypeVar

import structlog
from pydantic import Field, TypeAdapter, ValidationError

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.protocol.base import Wire
from pipelinejob_worker.recovery.agreement import Fetch
from pipelinejob_worker.recovery.pieces import MAX_LAYERS, NEVER, Held, Incarnation, Piece
from pipelinejob_worker.recovery.slots import SlotDamagedError, SlotMissingError, SlotStore
from pipelinejob_worker.recovery.transport import (
    STALL_SECONDS,
    Address,
    Connection,
    Pacer,
    Traffic,
    TransferError,
    connect,
    listen,
)

log = structlog.get_logger()

Size = Annotated[int, Field(ge=0, lt=1 << 48)]


class Greeting(Wire):
    """Who connects, and in which incarnation."""

    kind: Literal["greeting"] = "greeting"
    job_uid: str = Field(max_length=128)
    incarnation: Incarnation
    rank: int = Field(ge=0)


class Sized(Wire):
    """A piece and the size of its payload."""

    piece: Piece
    size: Size


class Reserve(Wire):
    """Have slots for copies of these pieces."""

    kind: Literal["reserve"] = "reserve"
    pieces: list[Sized] = Field(max_length=MAX_LAYERS)


class Put(Wire):
    """Keep this copy; the payload follows if the answer is ``accepted``."""

    kind: Literal["put"] = "put"
    held: Held
    checksum: int = Field(ge=0, lt=1 << 32)


class Get(Wire):
    """Send a piece; the payload follows the answer ``found``."""

    kind: Literal["get"] = "get"
    held: Held


class Doubt(Wire):
    """What came as this piece has another checksum: look at the slot, and drop it if that is so there too."""

    kind: Literal["doubt"] = "doubt"
    piece: Piece
    step: int = Field(ge=0)
    copied: bool


class Answer(Wire):
    """To every request. ``held``: there is nothing to send, as the guard has it already."""

    result: Literal["done", "accepted", "held", "found", "refused"]
    reason: str = Field("", max_length=1024)
    size: Size = 0
    checksum: int = Field(0, ge=0, lt=1 << 32)


Request = Reserve | Put | Get | Doubt
_REQUEST: TypeAdapter[Request] = TypeAdapter(Annotated[Request, Field(discriminator="kind")])
Message = TypeVar("Message", bound=Wire)


class _Route(NamedTuple):
    """How to move pieces: to whom, in which incarnation, how fast, over how many connections."""

    address: Address
    incarnation: Incarnation
    pacer: Pacer
    connections: int


class PieceServer:
    """Keeps copies for the rank that this one guards, and gives pieces to those who recover.

    Only members of this job and of the present incarnation are served.
    """

    def __init__(self, store: SlotStore, job_uid: str, stored: Callable[[], object] = lambda: None) -> None:
        """``stored`` is called after each copy that has come."""
        self._store = store
        self._job_uid = job_uid
        self._stored = stored
        self._incarnation = NEVER
        self._advanced = asyncio.Condition()
        self._tasks: dict[asyncio.Task[None], Incarnation | None] = {}
        """Connections, with the incarnation that they have been accepted for."""
        self._writers: dict[Piece, asyncio.Task[None]] = {}
        self.reserved: set[Piece] = set()
        """Pieces whose copies are kept in the present incarnation."""

        self._listener: socket.socket | None = None
        self.traffic = Traffic()

    async def start(self, host: str, port: int = 0) -> int:
        """Listen; return the port."""
        self._listener = listen(host, port)
        asyncio.get_running_loop().add_reader(self._listener, self._accept, self._listener)
        bound: int = self._listener.getsockname()[1]
        return bound

    async def advance(self, incarnation: Incarnation) -> None:
        """Serve this incarnation from now on; transfers of older ones are cut off when this returns."""
        async with self._advanced:
            if incarnation > self._incarnation:
                self._incarnation = incarnation
                self.reserved.clear()
            self._advanced.notify_all()
        await _cancel([task for task, served in self._tasks.items() if served and served < self._incarnation])

    async def stop(self) -> None:
        """Stop listening, and cut off all transfers."""
        if self._listener:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
        await _cancel(list(self._tasks))

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError as error:  # no descriptor left, or the client has gone meanwhile: the loop calls again
            log.warning("connection not accepted", error=str(error))
            return
        task = asyncio.create_task(self._serve(Connection(connection, self.traffic)))
        self._tasks[task] = None
        task.add_done_callback(self._tasks.pop)

    async def _serve(self, connection: Connection) -> None:
        try:
            if not (data := await connection.receive()):
                return
            greeting = Greeting.model_validate_json(data)
            if refusal := await self._refusal(greeting):
                log.warning("transfer refused", rank=greeting.rank, reason=refusal)
                await connection.send(Answer(result="refused", reason=refusal))
                return
            task = asyncio.current_task()
            assert task
            self._tasks[task] = greeting.incarnation
            await connection.send(Answer(result="done"))
            while data := await connection.receive(idle=True):
                await self._answer(connection, _REQUEST.validate_json(data))
        except (OSError, TimeoutError, TransferError, ValidationError) as error:
            log.warning("transfer cut off", error=str(error) or type(error).__name__)
        finally:
            connection.close()

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
            await _cancel([self._writers[piece]])
        self._writers[piece] = task
        try:
            yield
        finally:
            if self._writers.get(piece) is task:
                del self._writers[piece]

    async def _give(self, connection: Connection, get: Get) -> None:
        held = get.held
        if not self._store.holds(held):
            raise SlotMissingError(f"piece {held.piece} of step {held.step}, by {held.written}, is not held")
        payload, checksum = self._store.read(held.piece, held.step, copied=held.copied, verify=False)
        await connection.send(Answer(result="found", size=len(payload), checksum=checksum))
        await connection.send_payload(payload)


class PieceClient:
    """Sends this rank's pieces to its guard, and fetches what it lacks. Counts what it moves."""

    def __init__(self, store: SlotStore, job_uid: str, rank: int, traffic: Traffic | None = None) -> None:
        self._store = store
        self._job_uid = job_uid
        self._rank = rank
        self._reserved: Reserve | None = None
        self._reserved_by: tuple[Address, Incarnation] | None = None
        self.traffic = traffic or Traffic()

    async def guard(
        self,
        address: Address,
        incarnation: Incarnation,
        pieces: Sequence[Held],
        *,
        bytes_per_second: float = 0,
        connections: int = 2,
    ) -> None:
        """Have the agent at ``address`` hold copies of these own pieces; return when it holds them all.

        Raises TransferError when it does not.
        """
        route = _Route(address, incarnation, Pacer(bytes_per_second), connections)
        reserve = Reserve(pieces=[Sized(piece=held.piece, size=held.size) for held in pieces])
        if (self._reserved, self._reserved_by) != (reserve, (address, incarnation)):
            async with self._connected(route) as connection:
                await self._request(connection, reserve)

        async def send(connection: Connection, held: Held) -> None:
            payload, checksum = self._store.read(held.piece, held.step, copied=False, verify=False)
            if (await self._request(connection, Put(held=held, checksum=checksum))).result == "accepted":
                await connection.send_payload(payload)
                await self._done(connection)

        self._reserved = None  # should this fail, the guard is asked for everything again
        await self._in_parallel(route, pieces, send)
        self._reserved, self._reserved_by = reserve, (address, incarnation)

    async def fetch(
        self,
        addresses: Mapping[int, Address],
        incarnation: Incarnation,
        fetches: Sequence[Fetch],
        *,
        connections: int = 2,
    ) -> None:
        """Make all these pieces own ones; those that this rank holds as copies do not travel.

        Raises TransferError, or ConfigurationError when there is no room for them.
        """
        sizes = {fetch.held.piece: fetch.held.size for fetch in fetches}
        # One slot is enough to recover; the worker has the other made while it computes.
        await asyncio.to_thread(self._store.reserve, sizes, copied=False, slots=1)
        by_source: dict[int, list[Held]] = defaultdict(list)
        for fetch in fetches:
            by_source[fetch.source].append(fetch.held)
        local = by_source.pop(self._rank, [])
        transfers: list[Coroutine[None, None, None]] = [_in_thread(self._promote, local)]
        for source, pieces in by_source.items():
            route = _Route(addresses[source], incarnation, Pacer(0), connections)
            transfers.append(self._in_parallel(route, pieces, self._get))
        await _all(transfers)

    async def _get(self, connection: Connection, held: Held) -> None:
        found = await self._request(connection, Get(held=held))
        if found.size != held.size:
            raise TransferError(f"piece {held.piece} has {found.size} bytes there, not {held.size}")
        writing = self._store.begin(held.model_copy(update={"copied": False}))
        checksum = await connection.receive_payload(writing.payload)
        if checksum != found.checksum:
            await self._request(connection, Doubt(piece=held.piece, step=held.step, copied=held.copied))
            raise TransferError(f"piece {held.piece} of step {held.step} has changed on its way")
        writing.commit(checksum)

    def _promote(self, pieces: Sequence[Held]) -> None:
        """Copy the copies of others' pieces that this rank holds into slots of its own."""
        for held in pieces:
            try:
                payload, checksum = self._store.read(held.piece, held.step, copied=True)
            except (SlotMissingError, SlotDamagedError) as error:
                raise TransferError(str(error)) from error
            writing = self._store.begin(held.model_copy(update={"copied": False}))
            writing.payload[:] = payload
            writing.commit(checksum)

    async def _in_parallel(
        self, route: _Route, pieces: Sequence[Held], move: Callable[[Connection, Held], Awaitable[None]]
    ) -> None:
        """Move each piece over one of several connections, the largest first."""
        left = sorted(pieces, key=lambda held: held.size)

        async def work() -> None:
            async with self._connected(route) as connection:
                while left:
                    await move(connection, left.pop())

        await _all([work() for _ in range(min(route.connections, len(left)))])

    @asynccontextmanager
    async def _connected(self, route: _Route) -> AsyncIterator[Connection]:
        try:
            connection = Connection(await connect(route.address), self.traffic, route.pacer)
            try:
                await connection.send(Greeting(job_uid=self._job_uid, incarnation=route.incarnation, rank=self._rank))
                await self._done(connection)
                yield connection
            finally:
                connection.close()
        except (OSError, TimeoutError, ValidationError, SlotMissingError, SlotDamagedError, ValueError) as error:
            what = str(error) or f"nothing moved for {STALL_SECONDS:g} s"
            raise TransferError(f"{route.address.host}:{route.address.port}: {what}") from error

    async def _request(self, connection: Connection, request: Request) -> Answer:
        await connection.send(request)
        return await self._done(connection)

    async def _done(self, connection: Connection) -> Answer:
        data = await connection.receive()
        if not data:
            raise TransferError("the other side has closed the connection")
        answer = Answer.model_validate_json(data)
        if answer.result == "refused":
            raise TransferError(answer.reason)
        return answer


async def _all(work: Sequence[Coroutine[None, None, None]]) -> None:
    """Do everything at once; the first failure ends the rest and is raised.

    Unlike a TaskGroup this never lets a failure hide that the caller has been cancelled.
    """
    tasks = [asyncio.create_task(each) for each in work]
    if not tasks:
        return
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        await _cancel(tasks)
    for task in done:
        task.result()


async def _in_thread(function: Callable[..., None], *arguments: object) -> None:
    """Run in a thread; when cancelled, wait for its end, so that nothing writes to slots behind the caller's back."""
    thread = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        await asyncio.shield(thread)
    except asyncio.CancelledError:
        await asyncio.wait([thread])
        raise


async def _cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
