"""The link between an agent and its worker, over a real socket pair."""

import socket
from collections.abc import Iterator

import pytest

from pipelinejob_worker.link import EVENT, LINE_LIMIT_BYTES, AgentGoneError, AgentLink, Assignment, Drain, Joined
from pipelinejob_worker.protocol import Membership
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
    assert link.drain_requested()
    assert link.drain_requested(), "it is not forgotten"


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
