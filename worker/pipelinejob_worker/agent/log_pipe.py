"""What a child process prints: passed on, and its last lines kept."""

import asyncio
import os
import sys
from collections import deque
from collections.abc import AsyncIterator
from typing import Self

TAIL_LINES = 32
TAIL_LINE_CHARACTERS = 512
LINE_BYTES = 1 << 16
CLOSE_SECONDS = 1.0


class LogPipe:
    """A pipe for output and errors of a child; ``tail`` gets the last lines."""

    def __init__(self, reader: asyncio.StreamReader, descriptor: int, tail: deque[str]) -> None:
        self.descriptor: int | None = descriptor
        """Where the child writes."""

        self._tail = tail
        self._passing = asyncio.create_task(self._pass_on(reader))

    @classmethod
    async def open(cls, tail: deque[str]) -> Self:
        """Make the pipe; close ``descriptor`` with ``handed_over`` when the child has it."""
        ours, theirs = os.pipe()
        reader = asyncio.StreamReader(LINE_BYTES)
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(ours, "rb")
        )
        return cls(reader, theirs, tail)

    def handed_over(self) -> None:
        """Close our copy of the child's end."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    async def end(self) -> None:
        """Wait for the last lines; but what the child has started may hold the pipe open, and must not hold us."""
        self.handed_over()
        await asyncio.wait([self._passing], timeout=CLOSE_SECONDS)

    async def _pass_on(self, reader: asyncio.StreamReader) -> None:
        async for line in _lines(reader):
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
            self._tail.append(line.decode(errors="replace").rstrip()[:TAIL_LINE_CHARACTERS])


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
