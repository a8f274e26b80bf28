"""A process that has imported what workers need, and forks them: a worker trains some 60 ms after the request.

A fork copies only the calling thread, so a lock that another one holds stays locked in the child for ever, and OpenMP
and autograd do not work in the child of a process that has used them. So the zygote imports, and does nothing else.

The zygote is the workers' parent. It dies with the agent, and they with it: each asks the kernel for SIGKILL at its
parent's death.

Between agent and zygote there is a pair of sockets that keep message boundaries. Down: one byte with the descriptors
of a worker's link and log. Up: ``_MESSAGE`` when a worker has started (with a descriptor of the process) or ended.
"""

import asyncio
import ctypes
import gc
import importlib
import io
import os
import select
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, Self, cast

import structlog

from pipelinejob_worker.logs import configure

log = structlog.get_logger()

SINGLE_THREADED = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
"""Environment that keeps numpy's and Arrow's libraries from starting threads when they are imported."""

_PR_SET_PDEATHSIG = 1
_MESSAGE = struct.Struct("=cii")
"""What has happened, the worker's process id, and its exit code as subprocess gives it (negative for a signal)."""

_READY, _STARTED, _ENDED, _REFUSED = b"R", b"S", b"E", b"X"
_FORK = b"F"


class ZygoteDiedError(Exception):
    """The zygote has ended, and its workers with it; start another one."""


class ForkedWorker:
    """A worker process, forked by the zygote."""

    def __init__(self, pid: int, descriptor: int) -> None:
        self.pid = pid
        self._descriptor = descriptor
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def wait(self) -> int:
        """Wait for the end; return the exit code, negative for a signal."""
        return await asyncio.shield(self._ended)

    @property
    def running(self) -> bool:
        """Whether no end has been reported."""
        return not self._ended.done()

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, unless the worker has ended; never to another process that has got its number."""
        if self.running:
            try:
                signal.pidfd_send_signal(self._descriptor, number)
            except ProcessLookupError:
                return  # it has just ended, which the zygote is about to tell

    def _end(self, code: int) -> None:
        os.close(self._descriptor)
        self._ended.set_result(code)


class Zygote:
    """The agent's side. Not for use by several event loops."""

    def __init__(self, process: asyncio.subprocess.Process, connection: socket.socket) -> None:
        self._process = process
        self._connection = connection
        self._workers: dict[int, ForkedWorker] = {}
        self._waiting: list[asyncio.Future[ForkedWorker]] = []
        self._ready = asyncio.get_running_loop().create_future()
        self._dead = False
        asyncio.get_running_loop().add_reader(connection, self._receive)

    @classmethod
    async def start(
        cls,
        entry: str,
        environment: Mapping[str, str] = os.environ,
        *,
        preload: Sequence[str] = (),
        output: int | None = None,
    ) -> Self:
        """Start a zygote, which imports the module of ``entry`` and those of ``preload`` while this returns.

        ``entry``: ``module:function`` that a worker calls with its link; what it returns is the exit code. Workers
        have ``environment`` and what keeps libraries from starting threads. ``output``: descriptor of the zygote's
        own output and errors, if they are not the agent's.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                __name__,
                entry,
                str(theirs.fileno()),
                str(os.getpid()),
                *preload,
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**environment, **SINGLE_THREADED},
                start_new_session=True,  # a signal to the agent's group reaches the agent alone
            )
        return cls(process, ours)

    @property
    def pid(self) -> int:
        """Process id of the zygote."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it can still fork, as far as is known."""
        return not self._dead

    async def ready(self) -> None:
        """Wait until everything is imported. Raises ZygoteDiedError."""
        await asyncio.shield(self._ready)

    async def fork(self, connection: socket.socket, log_descriptor: int) -> ForkedWorker:
        """Fork a worker that owns ``connection`` and writes its output and errors to ``log_descriptor``.

        The caller closes its own copies of both. Waits for the imports if need be. Raises ZygoteDiedError, or OSError
        when there is no memory or process number left.
        """
        if self._dead:
            raise ZygoteDiedError(f"process {self.pid} has ended")
        started: asyncio.Future[ForkedWorker] = asyncio.get_running_loop().create_future()
        try:
            socket.send_fds(self._connection, [_FORK], [connection.fileno(), log_descriptor])
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ZygoteDiedError(f"process {self.pid} has ended") from error
        self._waiting.append(started)
        return await started

    async def stop(self) -> None:
        """End the zygote and all its workers, and wait for it."""
        if not self._dead:
            self._process.kill()
        await self._process.wait()
        self._lose()

    def _receive(self) -> None:
        """Take one message; the loop calls again while there are more."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._connection, _MESSAGE.size, 1)
        except ConnectionResetError:
            data, descriptors = b"", []
        if not data:
            self._lose()
            return
        kind, pid, code = _MESSAGE.unpack(data)
        if kind == _READY:
            self._ready.set_result(None)
        elif kind == _STARTED:
            worker = self._workers[pid] = ForkedWorker(pid, descriptors[0])
            self._answer(lambda waiting: waiting.set_result(worker))
        elif kind == _ENDED:
            self._workers.pop(pid)._end(code)
        elif kind == _REFUSED:
            self._answer(lambda waiting: waiting.set_exception(OSError(code, os.strerror(code))))

    def _answer(self, answer: Callable[[asyncio.Future[ForkedWorker]], None]) -> None:
        waiting = self._waiting.pop(0)
        if not waiting.cancelled():
            answer(waiting)

    def _lose(self) -> None:
        """The zygote has ended: so have its workers, killed by the kernel."""
        if self._dead:
            return
        self._dead = True
        asyncio.get_running_loop().remove_reader(self._connection)
        self._connection.close()
        died = ZygoteDiedError(f"process {self.pid} has ended")
        for future in [self._ready, *self._waiting]:
            if not future.done():
                future.set_exception(died)
                future.exception()  # whoever waits gets it; if nobody does, it is no news
        for worker in self._workers.values():
            worker._end(-signal.SIGKILL)
        self._workers.clear()


def main() -> int:
    """Serve an agent: ``python -m pipelinejob_worker.agent.zygote <entry> <descriptor> <agent's pid> <preload>...``."""
    entry, descriptor, agent = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    _die_with(agent)
    configure(process="zygote")
    module, _, function = entry.partition(":")
    work = cast(Callable[[socket.socket], int], getattr(importlib.import_module(module), function))
    for each in sys.argv[4:]:
        importlib.import_module(each)
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        log.warning("imports have started threads: forked workers may hang", threads=threads)
    with socket.socket(fileno=descriptor) as agent_link:
        link = _serve(agent_link)
    if link is None:
        return 0
    return _run(work, link)


def _serve(agent: socket.socket) -> socket.socket | None:
    """Fork and reap until the agent has gone; return None then, but in a forked worker return its link."""
    gc.collect()
    gc.freeze()  # the collector would otherwise write to, and so copy, every page of the forks
    agent.send(_MESSAGE.pack(_READY, os.getpid(), 0))
    workers: dict[int, int] = {}
    poll = select.poll()
    poll.register(agent, select.POLLIN)
    while True:
        for ready, _ in poll.poll():
            if ready != agent.fileno():
                poll.unregister(ready)
                _reap(agent, workers.pop(ready), ready)
                continue
            request, descriptors, _, _ = socket.recv_fds(agent, len(_FORK), 2)
            if not request:
                return None
            link, output = descriptors
            zygote = os.getpid()
            try:
                pid = os.fork()
            except OSError as error:
                agent.send(_MESSAGE.pack(_REFUSED, 0, error.errno or 0))
                os.close(link)
                os.close(output)
                continue
            if pid == 0:
                _become_worker(zygote, output, list(workers))
                return socket.socket(fileno=link)
            os.close(link)
            os.close(output)
            process = os.pidfd_open(pid)
            workers[process] = pid
            poll.register(process, select.POLLIN)
            socket.send_fds(agent, [_MESSAGE.pack(_STARTED, pid, 0)], [process])


def _run(work: Callable[[socket.socket], int], link: socket.socket) -> NoReturn:
    """Run a worker to its end, and leave without Python's own clearing up.

    That would visit, and so copy, every page shared with the zygote: most of a second, for which recovery waits.
    """
    try:
        with link:
            code = work(link)
    except SystemExit as error:  # as the interpreter takes it
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if not isinstance(error.code, int | None):
            print(error.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001 - as the interpreter does it: say why, and exit with 1
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _become_worker(zygote: int, output: int, others: list[int]) -> None:
    """Cut what ties a fresh fork to the zygote, except that it dies with it."""
    _die_with(zygote)
    os.setsid()
    for descriptor in others:
        os.close(descriptor)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    cast(io.TextIOWrapper, sys.stdout).reconfigure(line_buffering=True)  # a kill must not take the last lines along


def _reap(agent: socket.socket, pid: int, process: int) -> None:
    _, status = os.waitpid(pid, 0)
    os.close(process)
    agent.send(_MESSAGE.pack(_ENDED, pid, os.waitstatus_to_exitcode(status)))


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when ``parent`` ends, also if it has ended already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
