"""Workers of a Serve or Batch job in processes of their own, each with an address of its own, as pods have them."""

import itertools
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from pipelinejob_worker.link import Joined, Reached
from pipelinejob_worker.protocol import ENGINE_PORT, RING_PORT, Progress, WorkerConfig
from pipelinejob_worker.serve.hop import HopError
from pipelinejob_worker.serve.job import ServeJob
from pipelinejob_worker.serve.ring import Departure
from tests.unit.worker import forked
from tests.unit.worker.serve.group import PATIENCE_SECONDS, Front, members

_numbers = itertools.count()


def addresses(count: int) -> list[str]:
    """Addresses of the loopback interface that no other pod of these tests has, nor other tests at the same time."""
    process = os.getpid()
    return [f"127.{1 + process % 250}.{process // 250 % 250}.{1 + next(_numbers) % 250}" for _ in range(count)]


def serve_config(model: dict[str, Any], *, batch: dict[str, Any] | None = None, **members_: Any) -> WorkerConfig:
    """A job that serves a model, or answers a file."""
    engine = {"keyValueCacheMiB": 4, "batchTokens": 48, "deterministic": True}
    mode = {"mode": "Batch", "batch": engine | batch} if batch else {"mode": "Serve", "serve": engine}
    return WorkerConfig.model_validate(
        {"job": "tiny", "jobUid": "1", "model": model, "tokenizer": {"name": "Bytes"}} | mode | members_
    )


class Worker:
    """One worker. It takes part in one incarnation after another, and says what becomes of it."""

    def __init__(self, config: WorkerConfig, host: str, source: Path) -> None:
        forked._start_server()
        self.host = host
        self._directory = tempfile.TemporaryDirectory(prefix="worker-")
        self._log = Path(self._directory.name) / "log"
        self.in_ring = False
        self.progress = Progress()
        self._pipe, theirs = forked._server.Pipe()
        self.process = forked._server.Process(target=_work, args=(theirs, config, host, source, self._log))
        self.process.start()
        theirs.close()

    def join(self, *arguments: Any) -> None:
        self._pipe.send(arguments)

    def leave(self) -> None:
        self._pipe.send(())

    def hear(self) -> tuple[str, str]:
        """What becomes of it next: ``joined`` with its layers, ``ended``, ``lost`` or ``failed`` with the reason."""
        while isinstance(said := self._receive(), Reached):
            self.progress = said.progress
        self.in_ring = isinstance(said, Joined)
        return ("joined", said.layers) if isinstance(said, Joined) else said

    def told(self) -> Progress:
        """The next progress that it tells."""
        said = self._receive()
        assert isinstance(said, Reached), said
        return said.progress

    @property
    def loads(self) -> int:
        """How often it has loaded layers."""
        return self._log.read_text().count("layers loaded")

    def _receive(self) -> Any:
        assert self._pipe.poll(PATIENCE_SECONDS), "the worker says nothing"
        return self._pipe.recv()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.in_ring = False

    def close(self) -> None:
        self.kill()
        self._pipe.close()
        self._directory.cleanup()


def _work(pipe: Connection, config: WorkerConfig, host: str, source: Path, log: Path) -> None:
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    try:
        job = ServeJob(config, torch.device("cpu"), source, host=host)
        departure = Departure()
        orders: list[Any] = []
        ordered = threading.Semaphore(0)

        def obey() -> None:
            while True:
                order = pipe.recv()
                if order:
                    orders.append(order)
                    ordered.release()
                else:
                    departure.order()

        threading.Thread(target=obey, daemon=True).start()
        while True:
            ordered.acquire()
            departure = Departure()
            try:
                job.take_part(orders.pop()[0], departure, pipe.send)
                pipe.send(("ended", ""))
            except HopError as error:
                pipe.send(("lost", str(error)))
    except Exception as error:  # noqa: BLE001 - the test looks at it
        pipe.send(("failed", f"{type(error).__name__}: {error}"))


class Pods:
    """The workers of a job. ``incarnation`` counts."""

    def __init__(self, config: WorkerConfig, stages: int, source: Path = Path("/nowhere")) -> None:
        self._config = config
        self._source = source
        self.incarnation = 0
        self.workers = [Worker(config, host, source) for host in addresses(stages)]

    def form(self, stages: int | None = None) -> list[tuple[str, str]]:
        """Have the first ``stages`` of them take part in the next incarnation; what each says."""
        self.incarnation += 1
        present = self.workers[:stages]
        places = members(self.incarnation, [(worker.host, RING_PORT) for worker in present])
        for worker, place in zip(present, places, strict=True):
            worker.join(place)
        return [worker.hear() for worker in present]

    def replace(self, stage: int) -> None:
        """A new worker in a new pod, after the old one's end."""
        self.workers[stage].close()
        (host,) = addresses(1)
        self.workers[stage] = Worker(self._config, host, self._source)

    def front(self) -> Front:
        return Front(ENGINE_PORT, self.workers[0].host)


@contextmanager
def pods(config: WorkerConfig, stages: int, source: Path = Path("/nowhere")) -> Iterator[Pods]:
    """Workers that are gone behind the block."""
    running = Pods(config, stages, source)
    try:
        yield running
    finally:
        for worker in running.workers:
            worker.close()


def layers_of(said: Sequence[tuple[str, str]]) -> list[str]:
    """The layers of the stages, all of which have joined."""
    assert [what for what, _ in said] == ["joined"] * len(said), said
    return [layers for _, layers in said]
