"""A group of stages, as threads or as processes, and a front that talks to it."""

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import torch

from pipelinejob_worker.models import LayeredModel
from pipelinejob_worker.models.gpt import Gpt
from pipelinejob_worker.protocol import Preset
from pipelinejob_worker.protocol.base import Wire
from pipelinejob_worker.serve.engine import Layers, Leader
from pipelinejob_worker.serve.hop import HopError
from pipelinejob_worker.serve.ring import Address, Circle, Departure, Member
from pipelinejob_worker.serve.ring import form as meet
from pipelinejob_worker.serve.stage import Stage
from pipelinejob_worker.serve.text import Decode
from pipelinejob_worker.serve.wire import TO_FRONT, Cancel, Finished, Ready, Refused, Stats, Submit, Token, to_line
from pipelinejob_worker.serve.worker import Service, serve
from tests.unit.worker import forked

PATIENCE_SECONDS = 60.0
CACHE_BYTES = 4 << 20
"""More than the blocks that the tests use."""


def decode(tokens: Sequence[int]) -> str:
    return bytes(token % 256 for token in tokens).decode(errors="replace")


def service_of(model: LayeredModel, *, deterministic: bool = False, **others: Any) -> Service:
    settings = {"batch_tokens": 48, "accepted_tokens": 100_000, **others}
    return Service(
        model.fingerprint, model.vocabulary, model.context, model.width, deterministic=deterministic, **settings
    )


def cuts(model: LayeredModel, stages: int) -> list[range]:
    ends = [len(model.names) * stage // stages for stage in range(stages + 1)]
    return [range(start, stop) for start, stop in pairwise(ends)]


def stages_of(model: LayeredModel, stages: int, *, deterministic: bool = False) -> list[Stage]:
    return [
        Stage(model, indices, torch.device("cpu"), CACHE_BYTES, deterministic=deterministic)
        for indices in cuts(model, stages)
    ]


@dataclass
class Answers:
    """What came for one request."""

    tokens: list[Token] = field(default_factory=list)
    end: Finished | Refused | None = None

    @property
    def ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]

    @property
    def bits(self) -> list[tuple[Any, ...]]:
        """Everything that depends on the logits."""
        return [(token.position, token.token_id, token.logprob, tuple(token.top_logprobs)) for token in self.tokens]


class Front:
    """A front's connection to stage 0; checks what the protocol promises."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self._connection = socket.create_connection((host, port), timeout=PATIENCE_SECONDS)
        self._lines = self._connection.makefile("rb")
        self.answers: dict[str, Answers] = {}
        self.stats: list[Stats] = []
        ready = self.receive()
        assert isinstance(ready, Ready)
        self.ready = ready

    def send(self, *messages: Submit | Cancel) -> None:
        for message in messages:
            if isinstance(message, Submit):
                self.answers[message.request_id] = Answers()
        self._connection.sendall(b"".join(map(to_line, messages)))

    def send_raw(self, data: bytes) -> None:
        self._connection.sendall(data)

    def receive(self) -> Wire | None:
        """The next message; None when the connection has ended."""
        try:
            line = self._lines.readline()
        except ConnectionResetError:
            return None
        return TO_FRONT.validate_json(line) if line else None

    def take(self) -> bool:
        """Take one message; False when the connection has ended."""
        message = self.receive()
        if message is None:
            return False
        if isinstance(message, Stats):
            self.stats.append(message)
            return True
        assert isinstance(message, Token | Finished | Refused)
        mine = self.answers[message.request_id]
        assert mine.end is None
        if isinstance(message, Token):
            assert message.epoch == self.ready.epoch
            assert not mine.tokens or message.position == mine.tokens[-1].position + 1
            mine.tokens.append(message)
        else:
            mine.end = message
        return True

    def unfinished(self) -> list[str]:
        return [name for name, mine in self.answers.items() if mine.end is None]

    def finish(self) -> dict[str, Answers]:
        """Wait for the end of all requests."""
        while self.unfinished():
            assert self.take(), "the engine ended the connection"
        return self.answers

    def close(self) -> None:
        self._lines.close()
        self._connection.close()


def members(epoch: int, addresses: Sequence[Address]) -> list[Member]:
    """The places of the stages that listen at ``addresses``; each knows the next one's only."""
    nexts = [*addresses[1:], addresses[0]] if len(addresses) > 1 else [None]
    return [Member(epoch, stage, len(addresses), after) for stage, after in enumerate(nexts)]


def meet_neighbours(member: Member, listener: socket.socket, service: Service) -> Circle:
    return meet(member, listener, repr(service), time.monotonic() + PATIENCE_SECONDS, Departure())


@contextmanager
def threads(
    service: Service, layers: Sequence[Layers], blocks: int, decoder: Decode | None = decode, epoch: int = 1
) -> Iterator[tuple[Leader, int]]:
    """Serve with stages in threads of this process; gives stage 0's leader and the port for fronts."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in layers]
    addresses = tuple(listener.getsockname() for listener in listeners)
    started: SimpleQueue[tuple[Leader | None, int]] = SimpleQueue()
    failures: list[BaseException] = []

    def work(stage: int) -> None:
        try:
            circle = meet_neighbours(members(epoch, addresses)[stage], listeners[stage], service)
            try:
                serve(
                    service,
                    layers[stage],
                    blocks,
                    circle,
                    front=("127.0.0.1", 0),
                    decode=decoder,
                    started=lambda leader, port: started.put((leader, port)),
                )
            finally:
                circle.close()
        except HopError as error:
            failures.append(error)

    running = [threading.Thread(target=work, args=(stage,)) for stage in range(len(layers))]
    for thread in running:
        thread.start()
    places = [started.get(timeout=PATIENCE_SECONDS) for _ in running]
    ((leader, port),) = [(leader, port) for leader, port in places if leader]
    try:
        yield leader, port
    finally:
        leader.stop()
        for thread in running:
            thread.join(PATIENCE_SECONDS)
        for listener in listeners:
            listener.close()
    assert not failures
    assert not any(thread.is_alive() for thread in running)


class StageProcess:
    """A stage in a process of its own that keeps its layers from epoch to epoch."""

    def __init__(self, service: Service, build: Callable[[], Layers], blocks: int) -> None:
        forked._start_server()
        self._pipe, theirs = forked._server.Pipe()
        self.process = forked._server.Process(target=_stage, args=(theirs, service, build, blocks))
        self.process.start()
        theirs.close()
        self.address: tuple[str, int] = self.receive()

    def receive(self) -> Any:
        assert self._pipe.poll(PATIENCE_SECONDS), "the stage says nothing"
        return self._pipe.recv()

    def join(self, member: Member) -> None:
        self._pipe.send(member)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def form(stages: Sequence[StageProcess], epoch: int) -> int:
    """Make the processes one group; returns the port for fronts."""
    for stage, member in zip(stages, members(epoch, [stage.address for stage in stages]), strict=True):
        stage.join(member)
    kinds = [stage.receive() for stage in stages]
    assert [kind for kind, _ in kinds] == ["started"] * len(stages), kinds
    port: int = kinds[0][1]
    return port


def stage_of_preset(preset: Preset, stage: int, stages: int, *, deterministic: bool) -> Layers:
    model = Gpt(preset)
    return Stage(model, cuts(model, stages)[stage], torch.device("cpu"), CACHE_BYTES, deterministic=deterministic)


def _stage(pipe: Connection, service: Service, build: Callable[[], Layers], blocks: int) -> None:
    torch.set_num_threads(1)
    layers = build()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send(listener.getsockname())
        while True:
            try:
                circle = meet_neighbours(pipe.recv(), listener, service)
                try:
                    serve(
                        service,
                        layers,
                        blocks,
                        circle,
                        front=("127.0.0.1", 0),
                        decode=decode,
                        started=lambda _, port: pipe.send(("started", port)),
                    )
                finally:
                    circle.close()
            except HopError as error:
                pipe.send(("lost", str(error)))
