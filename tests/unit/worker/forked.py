"""Processes that start in milliseconds: forks of a server that has imported torch and computed nothing.

A process that ran a parallel region or a backward pass must not be forked (the child would hang), so neither
the test process nor another child is: the standard library's fork server keeps one clean parent for all.
"""

import multiprocessing
import os
import resource
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from pipelinejob_worker.link import EVENT, Assignment, Drain, Event, Failed, Reached
from pipelinejob_worker.protocol import Membership, WorkerConfig

Result = TypeVar("Result")

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["pipelinejob_worker.train.worker", "tests.unit.worker.reference"])


PATIENCE_SECONDS = 120.0


@cache
def _start_server() -> None:
    """Start the clean parent, in an environment of its own.

    It finds our modules by PYTHONPATH only, as Python 3.11 hands it no path, and numpy must not start threads in it: a
    fork beside another thread can inherit a lock that nobody will release.
    """
    before = dict(os.environ)
    os.environ |= {"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"}
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def call(function: Callable[..., Result], *arguments: Any) -> Result:
    """Return ``function(*arguments)`` as called in a fresh fork; an exception there fails the caller here."""
    _start_server()
    receiver, sender = _server.Pipe(duplex=False)
    process = _server.Process(target=_answer, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        if not receiver.poll(PATIENCE_SECONDS):
            raise TimeoutError(f"{function.__name__} took longer than {PATIENCE_SECONDS} s")
        result, failure = receiver.recv()
    finally:
        process.kill()
        process.join()
    if failure:
        raise AssertionError(failure)
    value: Result = result
    return value


def call_all(calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Return what each ``(function, *arguments)`` gives, each in a fork of its own, all at once."""
    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(lambda each: call(each[0], *each[1:]), calls))


def _answer(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        sender.send((function(*arguments), None))
    except BaseException:  # noqa: BLE001 - the caller raises it
        sender.send((None, traceback.format_exc()))


class Stage:
    """The worker of one stage, as its agent sees it: a process at the other end of a link."""

    def __init__(self, assignment: Assignment, log: Path, device: int, file_limit: int) -> None:
        _start_server()
        self._log = log
        self._connection, theirs = socket.socketpair()
        self._connection.settimeout(PATIENCE_SECONDS)
        self._lines = self._connection.makefile("rb")
        self._process = _server.Process(target=_work, args=(theirs, log, device, file_limit))
        self._process.start()
        theirs.close()
        self._send(assignment)
        self.failure: Failed | None = None

    def drain(self) -> None:
        """Ask for a drain."""
        self._send(Drain())

    def kill(self) -> None:
        """End the process without giving it a chance."""
        self._process.kill()

    def events(self) -> Iterator[Event]:
        """What the worker tells, until it ends."""
        for line in self._lines:
            event = EVENT.validate_json(line)
            if isinstance(event, Failed):
                self.failure = event
            yield event

    def until_step(self, step: int) -> None:
        """Wait until the worker has told that ``step`` steps are finished."""
        for event in self.events():
            if isinstance(event, Reached) and event.progress.step >= step:
                return
        raise AssertionError(f"the worker ended before step {step}; its log:\n{self.log}")

    def exit_code(self) -> int:
        """Wait for the end; a signal is negative."""
        for _ in self.events():
            pass
        self._process.join(PATIENCE_SECONDS)
        assert self._process.exitcode is not None, self.log
        return self._process.exitcode

    @property
    def log(self) -> str:
        """What the worker wrote to its standard output and error."""
        return self._log.read_text() if self._log.exists() else ""

    def close(self) -> None:
        """End the process and the link."""
        self._process.kill()
        self._process.join()
        self._lines.close()
        self._connection.close()

    def _send(self, message: Assignment | Drain) -> None:
        self._connection.sendall(message.to_json().encode() + b"\n")


def _work(connection: socket.socket, log: Path, device: int, file_limit: int) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    os.environ["LOCAL_RANK"] = str(device)
    os.environ.pop("OMP_NUM_THREADS", None)
    from pipelinejob_worker.train.worker import work

    sys.exit(work(connection))


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def pipeline(
    config: WorkerConfig,
    stages: int,
    logs: Path,
    checkpoints: Path | None = None,
    attempt: int = 0,
    last: WorkerConfig | None = None,
    device_per_stage: bool = False,
    last_file_limit: int = resource.RLIM_INFINITY,
    pipelines: int = 1,
) -> Iterator[list[Stage]]:
    """Run the workers of all stages of all pipelines, in the order of their ranks; none is left at the end.

    ``last``: another configuration for the last stage. ``device_per_stage``: stage n gets CUDA device n, not 0.
    ``last_file_limit``: bytes that a file of the last stage may have; a write beyond fails as on a full volume.
    """
    port = free_port()
    running: list[Stage] = []
    try:
        for rank in range(stages * pipelines):
            pipeline, stage = divmod(rank, stages)
            membership = Membership(
                epoch=attempt + 1,
                action="Run",
                stage=stage,
                stages=stages,
                pipeline=pipeline,
                pipelines=pipelines,
                master_address="127.0.0.1",
                master_port=port,
            )
            assignment = Assignment(
                membership=membership,
                config=last if last and stage == stages - 1 else config,
                attempt=attempt,
                checkpoint_directory=str(checkpoints) if checkpoints else "",
                scratch_directory=str(logs),
            )
            log = logs / f"attempt-{attempt}-rank-{rank}.log"
            limit = last_file_limit if stage == stages - 1 else resource.RLIM_INFINITY
            running.append(Stage(assignment, log, stage if device_per_stage else 0, limit))
        yield running
    finally:
        for stage_process in running:
            stage_process.close()


def run_to_end(
    config: WorkerConfig,
    stages: int,
    logs: Path,
    checkpoints: Path | None = None,
    attempt: int = 0,
    pipelines: int = 1,
) -> list[int]:
    """Run a job until all workers have ended; their exit codes in the order of the ranks."""
    with pipeline(config, stages, logs, checkpoints, attempt, pipelines=pipelines) as running:
        codes = [stage.exit_code() for stage in running]
        if any(codes):
            print(*(stage.log for stage in running), sep="\n")
        return codes
