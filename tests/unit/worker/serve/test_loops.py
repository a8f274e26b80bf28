"""The loops of single stages, beside neighbours that are played by the test."""

import queue
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from pipelinejob_worker.serve import engine
from pipelinejob_worker.serve.batch import Batch, Drawn, Piece
from pipelinejob_worker.serve.engine import Follower, Leader
from pipelinejob_worker.serve.hop import Bounds, End, Hop, HopError, Passed, Returned
from pipelinejob_worker.serve.ring import Ring
from pipelinejob_worker.serve.scheduler import Limits
from pipelinejob_worker.serve.wire import Ready, Sampling, Submit
from tests.unit.worker.serve.group import PATIENCE_SECONDS, Front

EPOCH, WIDTH = 5, 4
BOUNDS = Bounds(stages=2, batch_tokens=16, width=WIDTH, blocks=10)
READY = Ready(epoch=EPOCH, vocabulary=9, context=64, deterministic=False)
LIMITS = Limits(blocks=10, context=64, batches=2, batch_tokens=16, accepted_tokens=100)
GREEDY = Sampling(temperature=0)


@dataclass
class Adding:
    """Adds one to hidden states; the token behind a piece is the number of its last hidden state."""

    last: bool

    def run(self, batch: Batch, hidden: torch.Tensor | None = None) -> torch.Tensor:
        if hidden is None:
            return torch.tensor(batch.tokens)[:, None].expand(-1, WIDTH).float()
        return torch.eye(READY.vocabulary)[hidden[-1:, 0].long() + 1] if self.last else hidden + 1


@dataclass
class Beside:
    """A stage's ring, and the ends of its neighbours."""

    ring: Ring
    before: Hop
    after: Hop


@pytest.fixture
def beside() -> Iterator[Beside]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        hops = []
        for _ in range(2):
            hops.append(Hop(socket.create_connection(listener.getsockname(), PATIENCE_SECONDS), BOUNDS))
            hops.append(Hop(listener.accept()[0], BOUNDS))
    yield Beside(Ring(10, hops[1], hops[2]), hops[0], hops[3])
    for hop in hops:
        hop.close()


class Running:
    """A loop in a thread."""

    def __init__(self, run: object, *arguments: object) -> None:
        self.error: HopError | None = None
        self._thread = threading.Thread(target=self._run, args=(run, *arguments))
        self._thread.start()

    def _run(self, run: object, *arguments: object) -> None:
        try:
            run(*arguments)  # type: ignore[operator]
        except HopError as error:
            self.error = error

    def ended(self) -> str:
        self._thread.join(PATIENCE_SECONDS)
        assert not self._thread.is_alive()
        return str(self.error)


def passed(epoch: int, number: int, value: float) -> Passed:
    return Passed(epoch, Batch(number, (Piece(0, 1, (1,), GREEDY),)), torch.full((1, WIDTH), float(value)), (0.0,))


@pytest.mark.parametrize("last", [False, True])
def test_a_stage_passes_batches_on_in_order_and_drops_those_of_an_older_epoch(beside: Beside, last: bool) -> None:
    running = Running(Follower(Adding(last), beside.ring, EPOCH, last=last).run)
    for message in (passed(EPOCH - 1, 0, 7), passed(EPOCH, 1, 2), passed(EPOCH, 2, 3)):
        beside.before.send(message)
    found = [beside.after.receive() for _ in range(2)]
    assert [message.epoch for message in found] == [EPOCH, EPOCH]
    assert [len(message.busy) for message in found] == [2, 2]
    if last:
        assert [message.drawn[0].token for message in found if isinstance(message, Returned)] == [3, 4]
    else:
        assert [message.hidden[0, 0].item() for message in found if isinstance(message, Passed)] == [3, 4]
    beside.before.send(passed(EPOCH + 1, 3, 0))
    assert running.ended() == f"the stage before sent a message of epoch {EPOCH + 1}; this is {EPOCH}"


@pytest.mark.parametrize("last", [False, True])
def test_a_stage_hears_of_the_end_and_tells_the_next_one(beside: Beside, last: bool) -> None:
    running = Running(Follower(Adding(last), beside.ring, EPOCH, last=last).run)
    beside.before.send(End(EPOCH - 1))
    beside.before.send(End(EPOCH))
    assert running.ended() == "None"
    beside.ring.close()
    if not last:
        assert beside.after.receive() == End(EPOCH)
    with pytest.raises(HopError):
        beside.after.receive()


@pytest.fixture
def leader(beside: Beside) -> Iterator[tuple[Leader, Running, Front]]:
    leading = Leader(Adding(last=False), beside.ring, READY, LIMITS, None)
    port: queue.SimpleQueue[int] = queue.SimpleQueue()
    running = Running(leading.run, "127.0.0.1", 0, port.put)
    front = Front(port.get(timeout=PATIENCE_SECONDS))
    yield leading, running, front
    beside.before.close()
    running.ended()
    front.close()


def test_stage_0_drops_tokens_of_an_older_epoch(beside: Beside, leader: tuple[Leader, Running, Front]) -> None:
    leading, running, front = leader
    front.send(Submit(request_id="a", prompt_token_ids=[1, 2], max_tokens=2, sampling=GREEDY))
    for token in (3, 4):
        message = beside.after.receive()
        assert isinstance(message, Passed)
        beside.before.send(Returned(EPOCH - 1, message.batch.number, (Drawn(8),), (0.0, 0.0)))
        beside.before.send(Returned(EPOCH, message.batch.number, (Drawn(token),), (0.0, 0.0)))
    assert front.finish()["a"].ids == [3, 4]
    leading.stop()
    assert beside.after.receive() == End(EPOCH)
    beside.before.close()  # as the last stage does that has heard of the end
    assert running.ended() == "None"


def test_stage_0_does_not_wait_for_ever_until_the_others_have_ended(
    leader: tuple[Leader, Running, Front], monkeypatch: pytest.MonkeyPatch
) -> None:
    leading, running, _ = leader
    monkeypatch.setattr(engine, "END_SECONDS", 0.2)
    leading.stop()
    assert running.ended() == "the other stages have not ended within 0 s"


def test_a_batch_that_does_not_come_back_ends_the_epoch_and_all_connections(
    beside: Beside, leader: tuple[Leader, Running, Front], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, running, front = leader
    monkeypatch.setattr(engine, "SILENCE_SECONDS", 0.2)
    front.send(Submit(request_id="a", prompt_token_ids=[1, 2], max_tokens=2, sampling=GREEDY))
    beside.after.receive()
    while front.take():
        pass
    assert running.ended() == "a batch has not come back for 0 s"


def test_the_loss_of_the_last_stage_ends_the_epoch_and_all_connections(
    beside: Beside, leader: tuple[Leader, Running, Front]
) -> None:
    _, running, front = leader
    beside.before.close()
    while front.take():
        pass
    assert running.ended() == "a neighbour has closed the connection"


def test_texts_to_stop_at_need_a_tokenizer(leader: tuple[Leader, Running, Front]) -> None:
    _, _, front = leader
    front.send(Submit(request_id="a", prompt_token_ids=[1], max_tokens=1, stop=["x"]))
    assert front.finish()["a"].end.message.startswith("stop: this model has no tokenizer")  # type: ignore[union-attr]
