"""The worker as a child process: its link, its output and its end; and the zygote that forks it."""

import asyncio
import contextlib
import signal
import socket
from collections import deque
from collections.abc import AsyncIterator, Sequence

from pipelinejob_worker.agent.log_pipe import TAIL_LINES, LogPipe
from pipelinejob_worker.agent.program import Program
from pipelinejob_worker.agent.zygote import ForkedWorker, Zygote, ZygoteDiedError
from pipelinejob_worker.link import EVENT, LINE_LIMIT_BYTES, Event, Order


class WorkerProcess:
    """A running worker."""

    def __init__(
        self,
        forked: ForkedWorker,
        log: LogPipe,
        link: socket.socket,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._forked = forked
        self._log = log
        self._link = link
        self._reader = reader
        self._writer = writer

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._forked.pid

    @property
    def running(self) -> bool:
        """Whether no end has been reported."""
        return self._forked.running

    def send(self, order: Order, descriptors: Sequence[int] = ()) -> None:
        """Tell the worker; one that has just died does not hear it, and its end says more.

        ``descriptors`` go with the order, which nothing may be waiting to be sent before.
        """
        line = order.to_json().encode() + b"\n"
        sent = 0
        if descriptors:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                sent = socket.send_fds(self._link, [line], descriptors)
        self._writer.write(line[sent:])

    async def events(self) -> AsyncIterator[Event]:
        """What the worker tells, until it closes the link. Raises ValueError when it is not an event.

        A worker that is killed may leave a line without an end, and what it was being told breaks the link, too.
        """
        with contextlib.suppress(ConnectionError):
            while (line := await self._reader.readline()).endswith(b"\n"):
                yield EVENT.validate_json(line)

    async def end(self) -> int:
        """Wait for the end and for the last lines of output; return the exit code, negative for a signal."""
        code = await self._forked.wait()
        await self._log.end()
        self._writer.close()
        return code

    def kill(self) -> None:
        """End the process now, if it still runs."""
        self._forked.send_signal(signal.SIGKILL)


class Nursery:
    """The zygote of a job's workers, and another one when it has died. ``tail``: the last lines of their output."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._zygote: Zygote | None = None
        self._log: LogPipe | None = None
        self._starting = asyncio.Lock()
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)

    async def ready(self) -> None:
        """Wait until a worker can start at once. Raises ZygoteDiedError when it cannot import what it needs."""
        await (await self._living()).ready()

    async def start(self) -> WorkerProcess:
        """Start a worker. Raises ZygoteDiedError, or OSError when there is no memory or process number left."""
        zygote = await self._living()
        ours, theirs = socket.socketpair()
        log = await LogPipe.open(self.tail)
        assert log.descriptor is not None
        try:
            with theirs:
                forked = await zygote.fork(theirs, log.descriptor)
        except BaseException:
            ours.close()
            await log.end()
            raise
        log.handed_over()
        return WorkerProcess(forked, log, ours, *await asyncio.open_connection(sock=ours, limit=LINE_LIMIT_BYTES))

    async def stop(self) -> None:
        """End the zygote and all its workers."""
        if self._zygote:
            await self._zygote.stop()
        if self._log:
            await self._log.end()

    async def _living(self) -> Zygote:
        """Return the zygote, one for all that ask; a start goes on though who has asked for it is cancelled."""
        return await asyncio.shield(self._started())

    async def _started(self) -> Zygote:
        async with self._starting:
            if self._zygote is None or not self._zygote.alive:
                if self._log:
                    await self._log.end()
                self._log = await LogPipe.open(self.tail)
                self._zygote = await Zygote.start(
                    self._program.entry, preload=self._program.preload, output=self._log.descriptor
                )
                self._log.handed_over()
            return self._zygote


__all__ = ["Nursery", "WorkerProcess", "ZygoteDiedError"]
