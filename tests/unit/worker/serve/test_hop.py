"""What goes over a hop comes out the same; what no stage would send ends the connection and nothing else."""

import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from pipelinejob_worker.serve import hop
from pipelinejob_worker.serve.batch import Batch, Drawn, Piece
from pipelinejob_worker.serve.hop import Bounds, End, Hop, HopError, Passed, Returned
from pipelinejob_worker.serve.wire import Sampling

BOUNDS = Bounds(stages=4, batch_tokens=64, width=8, blocks=100)
SAMPLING = Sampling(temperature=0.7, top_k=3, top_p=0.5, seed=-(1 << 62), logprobs=True, top_logprobs=20)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    with one, other:
        yield one, other


def batch(*pieces: Piece) -> Batch:
    return Batch(1 << 40, pieces)


@pytest.mark.parametrize("element", [torch.float32, torch.bfloat16, torch.float16])
def test_a_batch_arrives_as_it_left(ends: tuple[socket.socket, socket.socket], element: torch.dtype) -> None:
    sent = Passed(
        7, batch(Piece(30, 4, (9, 3, 5), SAMPLING), Piece(0, 2, (1,))), torch.randn(6, 8).to(element), (0.5, 2.0)
    )
    Hop(ends[0], BOUNDS).send(sent)
    received = Hop(ends[1], BOUNDS).receive()
    assert isinstance(received, Passed)
    assert torch.equal(received.hidden, sent.hidden)
    assert replace(received, hidden=sent.hidden) == sent


def test_tokens_arrive_as_they_left(ends: tuple[socket.socket, socket.socket]) -> None:
    drawn = (Drawn(5), Drawn(None), Drawn(6, -0.25), Drawn(0, 0.0, ((0, 0.0), (9, -3.5))))
    sent = Returned(7, 3, drawn, (0.5, 2.0, 1.0))
    Hop(ends[0], BOUNDS).send(sent)
    Hop(ends[0], BOUNDS).send(Returned(7, 4, (), ()))
    receiver = Hop(ends[1], BOUNDS)
    assert receiver.receive() == sent
    assert receiver.receive() == Returned(7, 4, (), ())


def test_a_message_larger_than_the_sockets_buffers_arrives_whole(ends: tuple[socket.socket, socket.socket]) -> None:
    bounds = Bounds(stages=4, batch_tokens=4096, width=2048, blocks=1000)
    sent = Passed(1, batch(Piece(0, 4096, tuple(range(1, 257)))), torch.randn(4096, 2048), ())
    sender = threading.Thread(target=Hop(ends[0], bounds).send, args=(sent,))
    sender.start()
    received = Hop(ends[1], bounds).receive()
    sender.join()
    assert isinstance(received, Passed)
    assert torch.equal(received.hidden, sent.hidden)


def header(kind: int, first: int, second: int, rows: int = 0, width: int = 0, element: int = 0) -> bytes:
    return hop._PREFIX.pack(hop.MAGIC, kind, element, 0, 1, 1, first, second, rows, width)


WRONG = {
    "no message of this group": b"GET / HTTP/1.1\r\nHost: stage\r\nConnection: close\r\n\r\n",
    "kind 9": header(9, 0, 0),
    "element type 3": header(hop.BATCH, 0, 0, element=3),
    "announced 65 records; allowed: at most 64": header(hop.BATCH, 65, 0),
    "announced 101 records; allowed: at most 100": header(hop.BATCH, 0, 101),
    "65 x 8; allowed": header(hop.BATCH, 0, 0, rows=65, width=8),
    "1 x 9; allowed": header(hop.BATCH, 0, 0, rows=1, width=9),
    "1 hidden states for 0 tokens": header(hop.BATCH, 0, 0, rows=1, width=8) + bytes(32),
    "block tables that do not fit": header(hop.BATCH, 0, 1) + struct.pack("<I", 1),
    "alternatives": header(hop.DRAWN, 1, 2) + bytes(100),
    "closed the connection": header(hop.BATCH, 5, 0),
}


@pytest.mark.parametrize("problem", WRONG)
def test_what_no_stage_would_send_is_refused(ends: tuple[socket.socket, socket.socket], problem: str) -> None:
    ends[0].sendall(WRONG[problem])
    ends[0].close()
    with pytest.raises(HopError, match=problem):
        Hop(ends[1], BOUNDS).receive()


@pytest.mark.parametrize(("blocks", "problem"), [((1,), "1 blocks for 17 tokens"), ((1, 101), "do not fit 100 blocks")])
def test_a_piece_outside_the_cache_is_refused(
    ends: tuple[socket.socket, socket.socket], blocks: tuple[int, ...], problem: str
) -> None:
    Hop(ends[0], BOUNDS).send(Passed(1, batch(Piece(0, 17, blocks)), torch.zeros(17, 8), ()))
    with pytest.raises(HopError, match=problem):
        Hop(ends[1], BOUNDS).receive()


def test_the_end_arrives(ends: tuple[socket.socket, socket.socket]) -> None:
    Hop(ends[0], BOUNDS).send(End(3 << 20))
    assert Hop(ends[1], BOUNDS).receive() == End(3 << 20)


def test_closing_frees_a_thread_that_waits(ends: tuple[socket.socket, socket.socket]) -> None:
    waiting = Hop(ends[1], BOUNDS)
    found: list[HopError] = []

    def wait() -> None:
        try:
            waiting.receive()
        except HopError as error:
            found.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    waiting.close()
    thread.join(10)
    assert len(found) == 1
