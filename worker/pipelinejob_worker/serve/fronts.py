"""Stage 0's end of the connections to the fronts: lines in, lines out, in a thread of its own."""

import asyncio
import itertools
import queue
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

import structlog
from pydantic import ValidationError

from pipelinejob_worker.protocol.base import Wire
from pipelinejob_worker.serve.hop import tune
from pipelinejob_worker.serve.wire import LINE_LIMIT_BYTES, TO_ENGINE, Cancel, Ready, Stats, Submit, to_line

log = structlog.get_logger()

BEAT_SECONDS = 2.0
"""A batch may take longer; a front hears something at least this often."""

UNREAD_LIMIT_BYTES = 4 << 20
"""A front that leaves so much unread is disconnected, so that it cannot fill the memory."""


@dataclass(frozen=True)
class Arrived:
    """A front sent a message."""

    connection: int
    message: Submit | Cancel


@dataclass(frozen=True)
class Left:
    """A front's connection has ended."""

    connection: int


class Fronts:
    """Accepts fronts and hands on what they send; ``post`` gets Arrived and Left, from another thread."""

    def __init__(self, host: str, port: int, ready: Ready, post: Callable[[Arrived | Left], None]) -> None:
        """Listen. Raises OSError when the port is taken."""
        self._ready = ready
        self._post = post
        self._numbers = itertools.count()
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._spoke = False
        self._latest = b""
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        started: queue.SimpleQueue[int | OSError] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=self._loop.run_until_complete, args=(self._run(host, port, started),), name="fronts", daemon=True
        )
        self._thread.start()
        port_or_error = started.get()
        if isinstance(port_or_error, OSError):
            self._thread.join()
            self._loop.close()
            raise port_or_error
        self.port = port_or_error

    def send(self, messages: Iterable[tuple[int, Wire]]) -> None:
        """Send each message to its connection; those to connections that have ended are dropped.

        They are rendered by the other thread: this one is what all stages wait for.
        """
        if taken := list(messages):
            self._loop.call_soon_threadsafe(self._write, taken)

    def broadcast(self, stats: Stats) -> None:
        """Send statistics to all fronts, and again while no newer ones come: so they know that this end lives."""
        self._loop.call_soon_threadsafe(self._write_all, to_line(stats))

    def close(self) -> None:
        """End all connections and stop listening."""
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()
        self._loop.close()

    async def _run(self, host: str, port: int, started: "queue.SimpleQueue[int | OSError]") -> None:
        try:
            server = await asyncio.start_server(self._serve, host, port, limit=LINE_LIMIT_BYTES)
        except OSError as error:
            started.put(error)
            return
        started.put(server.sockets[0].getsockname()[1])
        while not self._stopping.is_set():
            self._spoke = False
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), BEAT_SECONDS)
            if not self._spoke:
                self._write_all(self._latest)
        server.close()
        for writer in self._writers.values():
            writer.transport.abort()
        await asyncio.gather(*self._tasks)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        connection = next(self._numbers)
        self._writers[connection] = writer
        try:
            tune(writer.get_extra_info("socket"))
            writer.write(to_line(self._ready))
            while line := await reader.readline():
                self._post(Arrived(connection, TO_ENGINE.validate_json(line)))
        except ValidationError as error:
            log.warning("a front sent what is no message", connection=connection, problems=error.error_count())
        except ValueError:
            log.warning("a front sent a line that is too long", connection=connection, limit=LINE_LIMIT_BYTES)
        except OSError as error:
            log.warning("a front is gone", connection=connection, error=str(error))
        finally:
            self._tasks.discard(task)
            del self._writers[connection]
            writer.transport.abort()
            self._post(Left(connection))

    def _write(self, messages: Iterable[tuple[int, Wire]]) -> None:
        for connection, message in messages:
            if writer := self._writers.get(connection):
                self._write_line(connection, writer, to_line(message))

    def _write_all(self, line: bytes) -> None:
        self._spoke, self._latest = True, line
        for connection, writer in self._writers.items():
            self._write_line(connection, writer, line)

    def _write_line(self, connection: int, writer: asyncio.StreamWriter, line: bytes) -> None:
        if writer.transport.is_closing():
            return
        writer.write(line)
        if writer.transport.get_write_buffer_size() > UNREAD_LIMIT_BYTES:
            log.warning("a front does not read; disconnected", connection=connection, limit=UNREAD_LIMIT_BYTES)
            writer.transport.abort()
