"""The connections to the engines: kept for each address that the file of engines names."""

import asyncio
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog
from pydantic import ValidationError

from pipelinejob_worker.front.dispatcher import Dispatcher, ProtocolError
from pipelinejob_worker.front.settings import Limits
from pipelinejob_worker.serve.wire import LINE_LIMIT_BYTES, TO_FRONT, Cancel, Ready, Submit, to_line

log = structlog.get_logger()

Address = tuple[str, int]

_CONNECT_SECONDS = 2.0
_FIRST_DELAY_SECONDS, _LONGEST_DELAY_SECONDS = 0.05, 1.0
_READ_FILE_SECONDS = 0.5
_TICK_SECONDS = 0.1


async def run(engines_file: Path, dispatcher: Dispatcher, limits: Limits) -> None:
    """Keep the engines connected and the dispatcher's time going, for ever."""
    async with asyncio.TaskGroup() as group:
        group.create_task(_tick(dispatcher))
        await _follow(engines_file, dispatcher, limits, group)


async def follow(engine: Address, dispatcher: Dispatcher, limits: Limits) -> None:
    """Do the same with the one engine of one pipeline."""
    async with asyncio.TaskGroup() as group:
        group.create_task(_tick(dispatcher))
        group.create_task(_keep(0, engine, dispatcher, limits))


def addresses(content: str) -> dict[int, Address]:
    """Read the file of engines: line k names the engine of pipeline k; an empty line is a pipeline without one.

    Raises ValueError that names the line.
    """
    return {pipeline: _address(line.strip()) for pipeline, line in enumerate(content.splitlines()) if line.strip()}


def _address(line: str) -> Address:
    host, _, port = line.rpartition(":")
    if not (host and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError(f"'{line[:200]}' is no address; allowed: host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _read(path: Path) -> dict[int, Address]:
    return addresses(path.read_text())


async def _tick(dispatcher: Dispatcher) -> None:
    loop = asyncio.get_running_loop()
    while True:
        dispatcher.tick(loop.time())
        await asyncio.sleep(_TICK_SECONDS)


async def _follow(path: Path, dispatcher: Dispatcher, limits: Limits, group: asyncio.TaskGroup) -> None:
    """Keep one connection for each address in the file; what is wrong in the file leaves the present ones alone."""
    kept: dict[int, tuple[Address, asyncio.Task[None]]] = {}
    problem = ""
    while True:
        try:
            wanted = _read(path)
        except (OSError, ValueError) as error:
            if str(error) != problem:
                problem = str(error)
                log.warning("the file of engines cannot be used", file=str(path), error=problem)
        else:
            problem = ""
            for pipeline in [one for one, (address, _) in kept.items() if wanted.get(one) != address]:
                _, task = kept.pop(pipeline)
                task.cancel()
                await asyncio.wait([task])
            for pipeline in wanted.keys() - kept.keys():
                task = group.create_task(_keep(pipeline, wanted[pipeline], dispatcher, limits))
                kept[pipeline] = wanted[pipeline], task
        await asyncio.sleep(_READ_FILE_SECONDS)


async def _keep(pipeline: int, address: Address, dispatcher: Dispatcher, limits: Limits) -> None:
    """Connect again and again, later each time until a connection has held; log what is new of the reasons."""
    loop = asyncio.get_running_loop()
    delay, said, since = _FIRST_DELAY_SECONDS, "", math.inf
    engine = log.bind(pipeline=pipeline, host=address[0], port=address[1])
    while True:
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                reader, writer = await asyncio.open_connection(*address, limit=LINE_LIMIT_BYTES)
            with _aborted(writer):
                await _greet(pipeline, reader, writer, dispatcher, limits)
                engine.info("engine connected", epoch=dispatcher.engines[pipeline].ready.epoch)
                said, since = "", loop.time()
                await _converse(pipeline, reader, dispatcher, limits)
        except (OSError, EOFError, TimeoutError, ValueError, ProtocolError) as error:
            if (problem := _explained(error, limits)) != said:
                engine.warning("engine not connected", error=problem)
                said = problem
        if loop.time() - since > _LONGEST_DELAY_SECONDS:
            delay, since = _FIRST_DELAY_SECONDS, math.inf
        await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311 - spreads the fronts, hides nothing
        delay = min(2 * delay, _LONGEST_DELAY_SECONDS)


@contextmanager
def _aborted(writer: asyncio.StreamWriter) -> Iterator[None]:
    try:
        yield
    finally:
        writer.transport.abort()


async def _greet(
    pipeline: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, dispatcher: Dispatcher, limits: Limits
) -> None:
    """Wait until the engine is ready, which it says first, and hand it to the dispatcher."""
    first = TO_FRONT.validate_json(await _line(reader, limits.silence_seconds))
    if not isinstance(first, Ready):
        raise ProtocolError(f"the engine said {first.kind} before ready")

    def send(message: Submit | Cancel) -> None:
        writer.write(to_line(message))

    dispatcher.ready(pipeline, first, send, asyncio.get_running_loop().time())


async def _converse(pipeline: int, reader: asyncio.StreamReader, dispatcher: Dispatcher, limits: Limits) -> None:
    """Obey the engine until it is silent, wrong or gone. Whatever ends this, its choices go elsewhere."""
    loop = asyncio.get_running_loop()
    try:
        while True:
            message = TO_FRONT.validate_json(await _line(reader, limits.silence_seconds))
            if isinstance(message, Ready):
                raise ProtocolError("the engine said ready twice")
            dispatcher.heard(pipeline, message, loop.time())
    finally:
        dispatcher.lost(pipeline, loop.time())


async def _line(reader: asyncio.StreamReader, seconds: float) -> bytes:
    async with asyncio.timeout(seconds):
        line = await reader.readline()
    if not line.endswith(b"\n"):
        raise EOFError("the engine closed the connection")
    return line


def _explained(error: Exception, limits: Limits) -> str:
    if isinstance(error, TimeoutError):
        return f"no connection within {_CONNECT_SECONDS:g} s, or no word within {limits.silence_seconds:g} s"
    if isinstance(error, ValidationError):
        return f"the engine sent what is no message: {error.errors(include_url=False, include_input=False)[0]['msg']}"
    return str(error) or type(error).__name__
