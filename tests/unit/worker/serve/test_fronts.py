"""Stage 0's connections to fronts: each is on its own."""

import queue
import socket
from collections.abc import Iterator

import pytest

from pipelinejob_worker.serve.fronts import UNREAD_LIMIT_BYTES, Arrived, Fronts, Left
from pipelinejob_worker.serve.wire import Cancel, Finished, Ready, Stats, Submit
from tests.unit.worker.serve.group import PATIENCE_SECONDS, Front

READY = Ready(epoch=3, vocabulary=10, context=20, deterministic=False)
STATS = Stats(
    epoch=3,
    queued=1,
    running=2,
    batches_in_flight=1,
    cache_blocks=9,
    cache_blocks_used=4,
    prompt_tokens_per_second=10,
    tokens_per_second=5,
    preemptions=0,
    bubble_percent=25,
)
Inbox = queue.SimpleQueue[Arrived | Left]


@pytest.fixture
def served() -> Iterator[tuple[Fronts, Inbox]]:
    inbox: Inbox = queue.SimpleQueue()
    fronts = Fronts("127.0.0.1", 0, READY, inbox.put)
    yield fronts, inbox
    fronts.close()


def finished(name: str, size: int = 0) -> Finished:
    return Finished(request_id=name, reason="error", message="x" * size)


def test_messages_go_both_ways_on_each_connection(served: tuple[Fronts, Inbox]) -> None:
    fronts, inbox = served
    one, other = Front(fronts.port), Front(fronts.port)
    assert one.ready == READY
    sent = [Submit(request_id="a", prompt_token_ids=[1], max_tokens=1), Cancel(request_id="b")]
    one.send(sent[0])
    arrived = inbox.get(timeout=PATIENCE_SECONDS)
    other.send(sent[1])
    assert [arrived, inbox.get(timeout=PATIENCE_SECONDS)] == [Arrived(0, sent[0]), Arrived(1, sent[1])]
    fronts.send([(1, finished("b")), (7, finished("nobody")), (0, finished("a"))])
    assert (one.receive(), other.receive()) == (finished("a"), finished("b"))
    fronts.broadcast(STATS)
    assert (one.receive(), other.receive()) == (STATS, STATS)
    one.close()
    assert inbox.get(timeout=PATIENCE_SECONDS) == Left(0)
    other.close()


def test_a_front_that_never_reads_is_disconnected_and_others_are_served(served: tuple[Fronts, Inbox]) -> None:
    fronts, inbox = served
    silent, front = Front(fronts.port), Front(fronts.port)
    sent = 0
    while inbox.empty():
        fronts.send([(0, finished("silent", size=1 << 20)), (1, finished("read"))])
        assert front.receive() == finished("read")
        sent += 1
    assert inbox.get() == Left(0)
    assert sent >= UNREAD_LIMIT_BYTES >> 20
    fronts.send([(0, finished("gone")), (1, finished("read"))])
    assert front.receive() == finished("read")
    silent.close()
    front.close()


def test_a_front_hears_the_latest_statistics_again_while_a_batch_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelinejob_worker.serve.fronts.BEAT_SECONDS", 0.1)
    inbox: Inbox = queue.SimpleQueue()
    fronts = Fronts("127.0.0.1", 0, READY, inbox.put)
    front = Front(fronts.port)
    fronts.broadcast(STATS)
    assert [front.receive() for _ in range(3)] == [STATS] * 3
    front.close()
    fronts.close()


def test_closing_ends_all_connections_and_frees_the_port() -> None:
    inbox: Inbox = queue.SimpleQueue()
    fronts = Fronts("127.0.0.1", 0, READY, inbox.put)
    front = Front(fronts.port)
    fronts.close()
    assert not front.take()
    with socket.create_server(("127.0.0.1", fronts.port)):
        pass
    front.close()


def test_a_port_that_is_taken_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="address already in use"):
        Fronts("127.0.0.1", taken.getsockname()[1], READY, print)
