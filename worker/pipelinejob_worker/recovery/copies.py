"""Sends pieces from this rank's memory to its guard's, and fetches what it lacks from others', over TCP.

Payloads go straight between the sockets and the slots' memory.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import chain
from typing import NamedTuple

import structlog
from pydantic import ValidationError

from pipelinejob_worker.recovery.agreement import Fetch
from pipelinejob_worker.recovery.pieces import Held, Incarnation
from pipelinejob_worker.recovery.requests import (
    Answer,
    Doubt,
    Get,
    Greeting,
    Put,
    Request,
    Reserve,
    Sized,
)
from pipelinejob_worker.recovery.slots import SlotDamagedError, SlotMissingError, SlotStore, Useless
from pipelinejob_worker.recovery.transport import (
    STALL_SECONDS,
    Address,
    Connection,
    Pacer,
    Traffic,
    TransferError,
    cancel,
    connect,
)

log = structlog.get_logger()


class _Route(NamedTuple):
    """How to move pieces: to whom, in which incarnation, how fast, over how many connections.

    ``kept``: the connections are for the next step's pieces, too.
    """

    address: Address
    incarnation: Incarnation
    pacer: Pacer
    connections: int
    kept: bool


class PieceClient:
    """Sends this rank's pieces to its guard, and fetches what it lacks. Counts what it moves."""

    def __init__(self, store: SlotStore, job_uid: str, rank: int, traffic: Traffic | None = None) -> None:
        self._store = store
        self._job_uid = job_uid
        self._rank = rank
        self._reserved: Reserve | None = None
        self._reserved_by: tuple[Address, Incarnation] | None = None
        self._idle: list[Connection] = []
        self._idle_to: tuple[Address, Incarnation] | None = None
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

        The connections stay open for the next step: a pod that is deleted while its node does not hear of it trains on,
        but a network policy lets it make no new ones. Raises TransferError when it does not hold them.
        """
        route = _Route(address, incarnation, Pacer(bytes_per_second), connections, kept=True)
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
        useless: Useless = lambda place, step: False,
        connections: int = 2,
    ) -> None:
        """Make all these pieces own ones; those that this rank holds as copies do not travel.

        ``useless`` slots are used again: new memory takes as long to come as what is moved into it.
        Raises TransferError, or ConfigurationError when there is no room for them.
        """
        adopted = [fetch.held for fetch in fetches if fetch.source == self._rank and fetch.sole]
        duplicated = [fetch.held for fetch in fetches if fetch.source == self._rank and not fetch.sole]
        by_source: dict[int, list[Held]] = defaultdict(list)
        for fetch in fetches:
            if fetch.source != self._rank:
                by_source[fetch.source].append(fetch.held)
        sizes = {held.piece: held.size for held in chain(duplicated, *by_source.values())}
        # One slot is enough to recover; the worker has the other made while it computes.
        await in_thread(self._store.recycle, sizes, useless)
        await asyncio.to_thread(self._store.reserve, sizes, copied=False, slots=1)
        transfers: list[Coroutine[None, None, None]] = [
            asyncio.to_thread(
                self._store.populate, sizes, copied=False, slots=1
            ),  # on another core, where there is one
            in_thread(self._own, self._store.adopt, adopted),
            in_thread(self._own, self._duplicate, duplicated),
        ]
        for source, pieces in by_source.items():
            route = _Route(addresses[source], incarnation, Pacer(0), connections, kept=False)
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

    def _own(self, take: Callable[[Held], None], copies: Sequence[Held]) -> None:
        """Make copies of others' pieces that this rank holds its own."""
        for held in copies:
            try:
                take(held)
            except (SlotMissingError, SlotDamagedError) as error:
                raise TransferError(str(error)) from error

    def _duplicate(self, held: Held) -> None:
        payload, checksum = self._store.read(held.piece, held.step, copied=True)
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

    def release(self) -> None:
        """Close what is kept open."""
        while self._idle:
            self._idle.pop().close()

    @asynccontextmanager
    async def _connected(self, route: _Route) -> AsyncIterator[Connection]:
        connection = self._take(route)
        try:
            if connection is None:
                connection = Connection(await connect(route.address), self.traffic)
                await connection.send(Greeting(job_uid=self._job_uid, incarnation=route.incarnation, rank=self._rank))
                await self._done(connection)
            connection.pacer = route.pacer
            yield connection
            if route.kept:
                self._keep(route, connection)
                connection = None
        except (OSError, TimeoutError, ValidationError, SlotMissingError, SlotDamagedError, ValueError) as error:
            what = str(error) or f"nothing moved for {STALL_SECONDS:g} s"
            raise TransferError(f"{route.address.host}:{route.address.port}: {what}") from error
        finally:
            if connection:
                connection.close()

    def _take(self, route: _Route) -> Connection | None:
        to = (route.address, route.incarnation)
        return self._idle.pop() if route.kept and self._idle and self._idle_to == to else None

    def _keep(self, route: _Route, connection: Connection) -> None:
        to = (route.address, route.incarnation)
        if self._idle_to != to:
            self.release()
            self._idle_to = to
        self._idle.append(connection)

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
        await cancel(tasks)
    for task in done:
        task.result()


async def in_thread(function: Callable[..., None], *arguments: object) -> None:
    """Run in a thread; when cancelled, wait for its end, so that nothing writes to slots behind the caller's back."""
    thread = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        await asyncio.shield(thread)
    except asyncio.CancelledError:
        await asyncio.wait([thread])
        raise
