"""The link between an agent and its worker, over a real socket pair."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from pipelinejob_worker.link import (
    EVENT,
    LINE_LIMIT_BYTES,
    AgentGoneError,
    AgentLink,
    Assignment,
    Drain,
    Fetched,
    Guarded,
    Joined,
    Order,
    Part,
)
from pipelinejob_worker.protocol import Membership
from pipelinejob_worker.recovery.pieces import Incarnation
from tests.unit.worker.jobs import job


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, AgentLink]]:
    agent, worker = socket.socketpair()
    with agent, worker:
        agent.settimeout(10)
        yield agent, AgentLink(worker)


def test_an_assignment_may_come_in_pieces_and_a_drain_right_behind_it(ends: tuple, tmp_path) -> None:
    agent, link = ends
    membership = Membership(epoch=1, action="Run", stage=0, stages=1, master_address="a", master_port=1)
    assignment = Assignment(membership=membership, config=job(tmp_path))
    text = assignment.to_json().encode() + b"\n" + Drain().to_json().encode() + b"\n"
    agent.sendall(text[:100])
    agent.sendall(text[100:])
    assert link.assignment() == assignment
    assert link.drain_requested() == Drain()
    assert link.drain_requested() == Drain(), "it is not forgotten"


def test_without_a_request_there_is_no_drain_and_no_wait(ends: tuple) -> None:
    _, link = ends
    assert not link.drain_requested()


def test_events_are_lines(ends: tuple) -> None:
    agent, link = ends
    link.send(Joined(layers="0-2"))
    assert EVENT.validate_json(agent.makefile().readline()) == Joined(layers="0-2")


def test_a_worker_notices_that_its_agent_has_gone(ends: tuple) -> None:
    agent, link = ends
    agent.close()
    with pytest.raises(AgentGoneError):
        link.assignment()
    with pytest.raises(AgentGoneError):
        link.drain_requested()
    with pytest.raises(AgentGoneError):
        link.send(Joined(layers="0-2"))


def test_a_line_without_an_end_is_not_collected_for_ever(ends: tuple) -> None:
    agent, link = ends
    agent.setblocking(False)
    sent = 0
    with pytest.raises(AgentGoneError, match="without a line end"):
        while sent <= 2 * LINE_LIMIT_BYTES:
            sent += agent.send(b"x" * 65536)
            link.drain_requested()


def assignment(tmp_path, step: int | None = None) -> Assignment:
    part = Part(
        incarnation=Incarnation(1, 1), rendezvous_port=1, step=step, directory="/d", memory_bytes=1, pulse="/d/pulse"
    )
    membership = Membership(epoch=1, action="Run", stage=0, stages=1, master_address="a", master_port=1)
    return Assignment(membership=membership, config=job(tmp_path), part=part)


def tell(agent: socket.socket, *orders: Order) -> None:
    agent.sendall(b"".join(order.to_json().encode() + b"\n" for order in orders))


def test_what_was_said_about_the_incarnation_before_does_not_count_for_the_next(ends: tuple, tmp_path) -> None:
    agent, link = ends
    tell(agent, assignment(tmp_path), Drain(), Guarded(step=9))
    link.assignment()
    assert link.drain_requested()
    assert link.wait_guarded(9, 0, lambda: False)
    tell(agent, Drain(), Fetched(), assignment(tmp_path, step=7))
    assert link.assignment().part.step == 7
    assert link.drain_requested() is None
    assert not link.wait_guarded(9, 0, lambda: False)
    waits: list[int] = []

    def wait() -> None:
        waits.append(1)
        tell(agent, Fetched())

    link.wait_fetched(wait)
    assert waits == [1]


def test_a_wait_for_the_guard_ends_with_its_word_its_time_or_the_order_to_leave(ends: tuple) -> None:
    agent, link = ends
    started = time.monotonic()
    assert not link.wait_guarded(3, 0.1, lambda: False)
    assert 0.1 <= time.monotonic() - started < 5
    assert not link.wait_guarded(3, 600, lambda: True)
    threading.Timer(0.05, tell, (agent, Guarded(step=3, seconds=0.5))).start()
    assert link.wait_guarded(3, 600, lambda: False)
    assert link.copy_seconds == 0.5


def test_the_listening_socket_comes_with_the_assignment_and_stale_ones_are_closed(ends: tuple, tmp_path) -> None:
    agent, link = ends
    line = assignment(tmp_path).to_json().encode() + b"\n"
    with socket.create_server(("127.0.0.1", 0)) as stale, socket.create_server(("127.0.0.1", 0)) as newest:
        socket.send_fds(agent, [line], [stale.fileno()])
        link.assignment()
        socket.send_fds(agent, [line], [newest.fileno()])
        link.assignment()
        with socket.socket(fileno=link.take_listener()) as taken:
            assert taken.getsockname() == newest.getsockname()
