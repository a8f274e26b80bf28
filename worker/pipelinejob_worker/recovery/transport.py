"""Frames and payloads over TCP: what copies travel in.

A frame is four bytes of length and JSON. Payloads go straight between the socket and the caller's memory.
"""

import asyncio
import socket
import time
import zlib
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import structlog

from pipelinejob_worker.protocol.base import Wire

log = structlog.get_logger()

FRAME_LIMIT_BYTES = 1 << 22
CHUNK_BYTES = 1 << 20
STALL_SECONDS = 10.0
"""How long a connection may move nothing before it is given up."""

_BACKLOG = 1024


class TransferError(Exception):
    """A piece did not arrive: the other side is gone, refuses, or holds something else."""


class Address(NamedTuple):
    """Where an agent serves its pieces."""

    host: str
    port: int


class Pacer:
    """Spreads bytes over time: a leaky bucket without a queue of its own. ``bytes_per_second`` 0 does not limit."""

    def __init__(self, bytes_per_second: float) -> None:
        self._rate = bytes_per_second
        self._free_at = 0.0

    def delay(self, size: int, now: float) -> float:
        """Return the seconds to wait before sending ``size`` bytes at ``now``, which are then counted as sent."""
        if not self._rate:
            return 0.0
        start = max(self._free_at, now)
        self._free_at = start + size / self._rate
        return start - now


@dataclass
class Traffic:
    """Bytes of payload since the start."""

    sent: int = 0
    received: int = 0


class Connection:
    """Frames and payloads over a non-blocking socket.

    Methods raise OSError, TimeoutError when nothing moves, and TransferError when the stream makes no sense.
    """

    def __init__(self, connection: socket.socket, traffic: Traffic) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A node that has vanished answers with nothing: the kernel gives up what it has not acknowledged by then.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(STALL_SECONDS * 1000))
        self._socket = connection
        self._loop = asyncio.get_running_loop()
        self._traffic = traffic
        self.pacer = Pacer(0)
        """Of payloads that are sent."""

    async def send(self, message: Wire) -> None:
        """Send a frame."""
        data = message.to_json().encode()
        async with asyncio.timeout(STALL_SECONDS):
            await self._loop.sock_sendall(self._socket, len(data).to_bytes(4, "big") + data)

    async def receive(self, *, idle: bool = False) -> bytes:
        """Return the next frame's JSON, empty at the end; ``idle``: however long it takes to begin."""
        length = bytearray(4)
        if not await self._fill(memoryview(length), may_end=True, first_timeout=None if idle else STALL_SECONDS):
            return b""
        size = int.from_bytes(length, "big")
        if not 0 < size <= FRAME_LIMIT_BYTES:
            raise TransferError(f"a frame of {size} bytes; allowed: 1 to {FRAME_LIMIT_BYTES}")
        data = bytearray(size)
        await self._fill(memoryview(data))
        return bytes(data)

    async def send_payload(self, payload: memoryview) -> None:
        """Send bytes at the pace that is set."""
        for start in range(0, len(payload), CHUNK_BYTES):
            chunk = payload[start : start + CHUNK_BYTES]
            if delay := self.pacer.delay(len(chunk), time.monotonic()):
                await asyncio.sleep(delay)
            async with asyncio.timeout(STALL_SECONDS):
                await self._loop.sock_sendall(self._socket, chunk)
            self._traffic.sent += len(chunk)
            await asyncio.sleep(0)  # where the socket always takes more, nobody else had a turn before the end

    async def receive_payload(self, memory: memoryview) -> int:
        """Fill ``memory``; return its CRC-32."""
        checksum, start, turn = 0, 0, CHUNK_BYTES
        while start < len(memory):
            if start >= turn:
                turn = start + CHUNK_BYTES
                await asyncio.sleep(0)  # where there always is more, nobody else had a turn before the end
            count = await self._receive_into(memory[start : start + CHUNK_BYTES], STALL_SECONDS)
            if count == 0:
                raise TransferError("the connection ended inside a payload")
            checksum = zlib.crc32(memory[start : start + count], checksum)
            start += count
            self._traffic.received += count
        return checksum

    async def _fill(
        self, memory: memoryview, *, may_end: bool = False, first_timeout: float | None = STALL_SECONDS
    ) -> bool:
        start = 0
        while start < len(memory):
            count = await self._receive_into(memory[start:], first_timeout if start == 0 else STALL_SECONDS)
            if count == 0:
                if may_end and start == 0:
                    return False
                raise TransferError("the connection ended inside a message")
            start += count
        return True

    async def _receive_into(self, memory: memoryview, limit: float | None) -> int:
        async with asyncio.timeout(limit):
            return await self._loop.sock_recv_into(self._socket, memory)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def listen(host: str = "", port: int = 0) -> socket.socket:
    """Return a non-blocking socket that listens, of both address families unless ``host`` says which. Raises OSError.

    ``port`` 0: any that is free.
    """
    if host or not socket.has_dualstack_ipv6():
        listener = socket.create_server((host, port), backlog=_BACKLOG)
    else:
        listener = socket.create_server((host, port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True)
    listener.setblocking(False)
    return listener


class Acceptor:
    """Listens, and serves each connection in a task of its own, which it also ends.

    Why not asyncio's server: a connection that comes while that one is closed may be kept open and unserved
    (python/cpython#109564), and a peer would wait at it.
    """

    def __init__(self, serve: Callable[[socket.socket], Coroutine[None, None, None]]) -> None:
        """A connection that ``serve`` has not detached is closed after it."""
        self._serve = serve
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def connections(self) -> int:
        """How many are served."""
        return len(self._tasks)

    def start(self, host: str, port: int) -> int:
        """Listen; return the port. Raises OSError."""
        self._listener = listen(host, port)
        asyncio.get_running_loop().add_reader(self._listener, self._accept, self._listener)
        bound: int = self._listener.getsockname()[1]
        return bound

    async def stop(self) -> None:
        """Stop listening, and end all connections."""
        listener, self._listener = self._listener, None
        if listener:
            asyncio.get_running_loop().remove_reader(listener)
            listener.close()
        await cancel(self._tasks)

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError as error:  # no descriptor left, or the client has gone meanwhile: the loop calls again
            log.warning("connection not accepted", error=str(error))
            return
        task = asyncio.create_task(self._serve(connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # Here, as a task that is cancelled before its first turn runs no line of its own.
        task.add_done_callback(lambda _: connection.close())


async def cancel(tasks: Iterable[asyncio.Task[None]]) -> None:
    """End tasks, and wait until they have ended."""
    ended = list(tasks)
    for task in ended:
        task.cancel()
    if ended:
        await asyncio.wait(ended)


async def connect(address: Address) -> socket.socket:
    """Connect, within ``STALL_SECONDS``. Raises OSError and TimeoutError."""
    async with asyncio.timeout(STALL_SECONDS):
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(*address, type=socket.SOCK_STREAM)
        family, kind, protocol, _, target = found[0]
        connection = socket.socket(family, kind, protocol)
        connection.setblocking(False)
        try:
            await loop.sock_connect(connection, target)
        except BaseException:
            connection.close()
            raise
        return connection
