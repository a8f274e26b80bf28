"""The worker as a child process: its link, its output and its end."""

import asyncio
import contextlib
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import BinaryIO, Self

from pipelinejob_worker.link import EVENT, LINE_LIMIT_BYTES, Assignment, Drain, Event

TAIL_LINES = 32
TAIL_LINE_CHARACTERS = 512
OUTPUT_LINE_BYTES = 1 << 16
CLOSE_SECONDS = 1.0


class WorkerProcess:
    """A running worker. ``tail`` holds the last lines of its output."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        assert process.stdout and process.stderr
        self._tees = [
            asyncio.create_task(self._tee(process.stdout, sys.stdout.buffer)),
            asyncio.create_task(self._tee(process.stderr, sys.stderr.buffer)),
        ]

    @classmethod
    async def start(cls, command: Sequence[str]) -> Self:
        """Start ``command`` with the descriptor of its end of the link as the last argument."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *command,
                str(theirs.fileno()),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                limit=OUTPUT_LINE_BYTES,
                start_new_session=True,  # a signal to the agent's group reaches the agent alone, which drains
            )
        return cls(process, *await asyncio.open_connection(sock=ours, limit=LINE_LIMIT_BYTES))

    def send(self, message: Assignment | Drain) -> None:
        """Tell the worker; one that has just died does not hear it, and its end says more."""
        self._writer.write(message.to_json().encode() + b"\n")

    async def events(self) -> AsyncIterator[Event]:
        """What the worker tells, until it closes the link. Raises ValueError when it is not an event."""
        with contextlib.suppress(ConnectionResetError):
            while line := await self._reader.readline():
                yield EVENT.validate_json(line)

    async def end(self) -> int:
        """Wait for the end and for the last lines of output; return the exit code, negative for a signal."""
        code = await self._process.wait()
        # A process that the worker has started may hold the pipes open: it must not hold the agent.
        await asyncio.wait(self._tees, timeout=CLOSE_SECONDS)
        return code

    async def kill(self) -> None:
        """End the process now, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self.end()
        self._writer.close()

    async def _tee(self, stream: asyncio.StreamReader, output: BinaryIO) -> None:
        async for line in _lines(stream):
            output.write(line)
            output.flush()
            self.tail.append(line.decode(errors="replace").rstrip()[:TAIL_LINE_CHARACTERS])


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Lines of ``stream``; one longer than its limit comes in parts, and the last may have no end."""
    while True:
        try:
            line = await stream.readuntil(b"\n")
        except asyncio.LimitOverrunError as error:
            line = await stream.read(error.consumed)
        except asyncio.IncompleteReadError as error:
            line = error.partial
        if not line:
            return
        yield line
