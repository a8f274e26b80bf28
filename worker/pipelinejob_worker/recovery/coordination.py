"""The agents' connections to the coordinator: members, the server on rank 0, and beats both ways."""

import asyncio
import socket
import time
from typing import Protocol

import structlog
from pydantic import TypeAdapter

from pipelinejob_worker.protocol.base import Wire
from pipelinejob_worker.recovery.deadlines import Punctual
from pipelinejob_worker.recovery.incarnation import Coordinator, Outgoing
from pipelinejob_worker.recovery.messages import (
    LINE_LIMIT_BYTES,
    TO_COORDINATOR,
    TO_MEMBER,
    Abort,
    Applied,
    Beat,
    Broken,
    Done,
    Finished,
    Holds,
    Join,
    Plan,
    Refused,
    Released,
    Settled,
    Start,
    ToCoordinator,
    ToMember,
    to_line,
)
from pipelinejob_worker.recovery.pieces import Incarnation
from pipelinejob_worker.recovery.transport import Acceptor, Address

log = structlog.get_logger()

BEAT_SECONDS = 0.1
SILENCE_SECONDS = 1.0
"""Who has sent nothing for so long is taken for lost."""

RETRY_SECONDS = 0.1


class Stage(Protocol):
    """What an agent does at the coordinator's word. No two of these run at once."""

    async def join(self) -> Join:
        """Return what this rank holds, once it may start a worker again; its worker is in no group."""

    async def apply(self, plan: Plan) -> None:
        """Write the plan down, and invalidate what it makes void. Raises OSError."""

    async def start(self, plan: Plan) -> None:
        """Have the worker join the group; return without waiting for it."""

    async def abort(self, incarnation: Incarnation, reason: str) -> None:
        """Have the worker leave the group, or end it; return when it is out."""


class Channel:
    """Messages of one kind over one connection, with beats, until it ends or the other side falls silent."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        incoming: TypeAdapter[ToMember] | TypeAdapter[ToCoordinator],
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._incoming = incoming
        self._queue: asyncio.Queue[Wire | None] = asyncio.Queue()
        self._heard_at = time.monotonic()
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._beat())]
        self.end = "the connection was closed"
        """Why it ended."""

    @property
    def alive(self) -> bool:
        """Whether the other side has been heard of late."""
        return time.monotonic() - self._heard_at <= SILENCE_SECONDS

    def send(self, message: Wire) -> None:
        """Send a message; one that does not arrive is followed by the end of the connection."""
        self._writer.write(to_line(message))

    async def receive(self) -> Wire | None:
        """Return the next message that is no beat; None at the end."""
        return await self._queue.get()

    def cut(self, reason: str) -> None:
        """End the connection now, whatever has not been sent; ``receive`` returns None then."""
        self.end = reason
        self._writer.transport.abort()
        self._queue.put_nowait(None)

    async def close(self) -> None:
        """End the connection after what has been sent, unless the other side does not take it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._writer.close()
        try:
            async with asyncio.timeout(SILENCE_SECONDS):
                await self._writer.wait_closed()
        except (OSError, TimeoutError):
            self._writer.transport.abort()

    async def _read(self) -> None:
        try:
            while line := await self._reader.readline():
                self._heard_at = time.monotonic()
                message = self._incoming.validate_json(line)
                if not isinstance(message, Beat):
                    self._queue.put_nowait(message)
        except (OSError, ValueError) as error:  # among the latter: a line too long, and what is no message
            self.end = str(error).splitlines()[0] if str(error) else type(error).__name__
        self._queue.put_nowait(None)

    async def _beat(self) -> None:
        punctual = Punctual(BEAT_SECONDS)
        while True:
            self.send(Beat())
            await asyncio.sleep(BEAT_SECONDS)
            now = time.monotonic()
            if punctual.fit_to_judge(now) and now - self._heard_at > SILENCE_SECONDS:
                self.cut(f"nothing was heard for {SILENCE_SECONDS:g} s")
                return


class CoordinatorServer:
    """The coordinator of one epoch, on the agent of rank 0."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._channels: dict[int, Channel] = {}
        self._acceptor = Acceptor(self._serve)

    def start(self, host: str, port: int = 0) -> int:
        """Listen; return the port. Raises OSError."""
        return self._acceptor.start(host, port)

    async def stop(self) -> None:
        """End all connections; the members will ask the next coordinator."""
        await self._acceptor.stop()

    async def _serve(self, accepted: socket.socket) -> None:
        connection = socket.socket(fileno=accepted.detach())  # the transport's to close
        reader, writer = await asyncio.open_connection(sock=connection, limit=LINE_LIMIT_BYTES)
        channel = Channel(reader, writer, TO_COORDINATOR)
        rank: int | None = None
        try:
            while message := await channel.receive():
                if isinstance(message, Join):
                    if refused := self._coordinator.refusal(message) or self._taken(message.rank, channel):
                        channel.send(refused)
                        return
                    rank = message.rank
                    self._welcome(rank, channel)
                    self._send(self._coordinator.join(message))
                elif rank is None or self._channels.get(rank) is not channel:
                    return  # it speaks before it has joined, or another connection of its rank has replaced it
                elif isinstance(message, Holds):
                    self._coordinator.holds(rank, message)
                elif isinstance(message, Applied):
                    self._send(self._coordinator.applied(rank, message))
                elif isinstance(message, Broken):
                    self._send(self._coordinator.broken(rank, message))
                elif isinstance(message, Settled):
                    self._send(self._coordinator.settled(message))
                elif isinstance(message, Finished):
                    self._send(self._coordinator.finished(rank, message))
        finally:
            if rank is not None and self._channels.get(rank) is channel:
                del self._channels[rank]
                log.info("a rank is lost", rank=rank, reason=channel.end)
                self._send(self._coordinator.gone(rank, channel.end))
            await channel.close()

    def _taken(self, rank: int, channel: Channel) -> Refused | None:
        """Refuse a second agent of a rank whose first one lives: one of the two pods is on its way out.

        Taking the newest would let them take the rank from each other for ever.
        """
        present = self._channels.get(rank)
        if present is None or present is channel or not present.alive:
            return None
        return Refused(reason=f"rank {rank} is taken by another agent, which lives")

    def _welcome(self, rank: int, channel: Channel) -> None:
        """Take the newest connection of a rank for the rank."""
        before, self._channels[rank] = self._channels.get(rank), channel
        if before is not None and before is not channel:
            before.cut("another agent has taken the rank")
            self._send(self._coordinator.gone(rank, before.end))

    def _send(self, outgoing: Outgoing) -> None:
        for rank, message in outgoing.items():
            if rank in self._channels:
                self._channels[rank].send(message)


class Member:
    """An agent's side, on every rank: keeps in touch with the coordinator, and makes its stage do what it says."""

    def __init__(self, stage: Stage, coordinator: Address) -> None:
        self._stage = stage
        self._coordinator = coordinator
        self._channel: Channel | None = None
        self._plan: Plan | None = None
        self.refused = ""
        """Why the coordinator has not let this rank join, empty after it has."""

        self.released = False
        """Whether this rank, which leaves, has given all that is needed of it."""

        self.done = asyncio.Event()
        """Set when all ranks have finished."""

    @property
    def incarnation(self) -> Incarnation | None:
        """The incarnation that this rank is in; None while the next one is being agreed on."""
        return self._plan.incarnation if self._plan else None

    async def run(self) -> None:
        """Take part until cancelled, whatever happens to the coordinator. Raises what the stage raises."""
        while True:
            try:
                reader, writer = await asyncio.open_connection(*self._coordinator, limit=LINE_LIMIT_BYTES)
            except OSError:
                await asyncio.sleep(RETRY_SECONDS)
                continue
            self._channel = Channel(reader, writer, TO_MEMBER)
            try:
                await self._take_part(self._channel)
                await self._leave(f"lost the coordinator: {self._channel.end}")
            finally:
                channel, self._channel = self._channel, None
                await channel.close()
            await asyncio.sleep(RETRY_SECONDS)

    def report(self, incarnation: Incarnation, reason: str, message: str, *, own: bool) -> None:
        """Tell that this rank's worker has left the group of an incarnation, or ended; all are told to leave then.

        Without a connection nothing is told: everybody leaves anyway.
        """
        if self._channel:
            self._channel.send(Broken(incarnation=incarnation, reason=reason, message=message[:1024], own=own))

    def tell(self, message: Holds | Settled | Finished) -> None:
        """Tell the coordinator; if it does not arrive, the next incarnation tells it again."""
        if self._channel:
            self._channel.send(message)

    async def _take_part(self, channel: Channel) -> None:
        channel.send(await self._stage.join())
        while message := await channel.receive():
            match message:
                case Plan():
                    self.refused = ""
                    self._plan = message
                    await self._stage.apply(message)
                    channel.send(Applied(incarnation=message.incarnation))
                case Start(incarnation=incarnation) if self._plan and incarnation == self._plan.incarnation:
                    await self._stage.start(self._plan)
                case Abort(incarnation=incarnation) if self._plan and incarnation == self._plan.incarnation:
                    await self._leave(message.reason)
                    channel.send(await self._stage.join())
                case Released():
                    self.released = True
                case Done():
                    self.done.set()
                case Refused(reason=reason):
                    if reason != self.refused:
                        log.info("not allowed to join yet", reason=reason)
                    self.refused = reason
                    return

    async def _leave(self, reason: str) -> None:
        plan, self._plan = self._plan, None
        if plan:
            log.info("leaving an incarnation", incarnation=str(plan.incarnation), reason=reason)
            await self._stage.abort(plan.incarnation, reason)
