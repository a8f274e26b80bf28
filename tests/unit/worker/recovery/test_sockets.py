"""A wait for a frozen peer ends within milliseconds when this process shuts down its own end of the connection."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import distributed

from pipelinejob_worker.agent.charge import LEAVE_SECONDS
from pipelinejob_worker.pipeline.group import Meeting, is_link_error, joined
from pipelinejob_worker.protocol import Membership
from pipelinejob_worker.recovery.pulse import Doing, Heart, LeaveError, Pulse
from pipelinejob_worker.recovery.sockets import shut_down, tcp_sockets
from tests.unit.worker import forked
from tests.unit.worker.agents import until
from tests.unit.worker.ranks import SILENCE_LIMIT


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as one:
        one.connect(listener.getsockname())
        other, _ = listener.accept()
        with other:
            yield one, other


def inode(connection: socket.socket) -> int:
    return os.fstat(connection.fileno()).st_ino


def test_only_connections_are_shut_down_and_those_to_spare_are_not(pair: tuple[socket.socket, socket.socket]) -> None:
    one, other = pair
    before = tcp_sockets()
    assert {inode(one), inode(other)} <= before
    assert shut_down(spare=before) == 0
    one.sendall(b"x")
    assert other.recv(1) == b"x"
    link, agent = socket.socketpair()
    with link, agent:
        assert shut_down(spare=before - {inode(one)}) == 1
        with pytest.raises(BrokenPipeError):
            one.sendall(b"x")
        assert other.recv(1) == b""
        link.sendall(b"the link to the agent is none of TCP")
        assert agent.recv(64)


@pytest.mark.parametrize(("peers", "count"), [(["10.0.0.9"], 0), (["10.0.0.9", "::ffff:127.0.0.1"], 2)])
def test_with_peers_given_only_connections_with_them_are(
    pair: tuple[socket.socket, socket.socket], peers: list[str], count: int
) -> None:
    assert shut_down(spare=tcp_sockets() - {inode(end) for end in pair}, peers=peers) == count


def receive() -> None:
    distributed.recv(torch.zeros(1), 1)


def send() -> None:
    distributed.isend(torch.zeros(50_000_000), 1).wait()


def reduce() -> None:
    distributed.all_reduce(torch.zeros(1))


def _rank(rank: int, port: int, wait: Callable[[], None]) -> tuple[float, bool, int]:
    """Rank 1 tells its process number and sleeps; rank 0 freezes it, waits for it, and frees itself."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    before = tcp_sockets()
    store = distributed.TCPStore("127.0.0.1", port, world_size=2, is_master=rank == 0, timeout=SILENCE_LIMIT)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=SILENCE_LIMIT)
    distributed.all_reduce(torch.zeros(1))
    if rank == 1:
        store.set("pid", str(os.getpid()))
        signal.pause()
    victim = int(store.get("pid"))
    os.kill(victim, signal.SIGSTOP)
    freed_at: list[float] = []
    counts: list[int] = []

    def free() -> None:
        freed_at.append(time.monotonic())
        counts.append(shut_down(spare=before))

    timer = threading.Timer(0.3, free)
    timer.start()
    try:
        wait()
    except RuntimeError as error:
        freed = time.monotonic()
        timer.join()  # the wait may end before the call that ends it has returned
        return freed - freed_at[0], is_link_error(error), counts[0]
    finally:
        os.kill(victim, signal.SIGKILL)
    raise AssertionError("the peer was frozen, and yet the wait has ended")


@pytest.mark.parametrize("wait", [receive, send, reduce])
def test_a_wait_of_gloo_for_a_frozen_peer_ends(wait: Callable[[], None]) -> None:
    port = forked.free_port()
    sleeper = threading.Thread(target=_expect_no_answer, args=(port, wait))
    sleeper.start()
    seconds, lost_link, count = forked.call(_rank, 0, port, wait)
    sleeper.join()
    assert seconds < 1.0
    assert lost_link, "the error is taken for the loss of a peer, not for a failure of this rank"
    assert count >= 2, "the store's connection and the group's"


def _expect_no_answer(port: int, wait: Callable[[], None]) -> None:
    with pytest.raises(EOFError):  # it is killed while it sleeps
        forked.call(_rank, 1, port, wait)


def _meet_nobody(path: Path, port: int) -> tuple[str, float]:
    """Try to meet at a store; return what ended that, and how long after the order to leave."""
    pulse = Pulse.open(path)
    before, ordered = tcp_sockets(), [0.0]

    def leave() -> None:
        ordered[0] = ordered[0] or time.monotonic()
        shut_down(spare=before)

    heart = Heart(pulse, leave)
    membership = Membership(epoch=1, action="Run", stage=1, stages=2, master_address="127.0.0.1", master_port=1)
    try:
        with joined(membership, torch.device("cpu"), Meeting("incarnation-1.1", port, None, pulse)):
            return "joined", 0.0
    except LeaveError:
        return "left", time.monotonic() - ordered[0]
    finally:
        heart.stop()


@pytest.mark.parametrize("listens", [True, False], ids=["a master that never answers", "a master that is gone"])
def test_who_waits_for_the_store_leaves_when_it_is_ordered_to(tmp_path: Path, listens: bool) -> None:
    pulse = Pulse.create(tmp_path / "pulse")
    with socket.create_server(("127.0.0.1", 0)) as master:
        port = master.getsockname()[1]
        if not listens:
            master.close()
        with ThreadPoolExecutor(1) as thread:
            meeting = thread.submit(forked.call, _meet_nobody, tmp_path / "pulse", port)
            until(lambda: pulse.signs().doing == Doing.WAITING)
            pulse.order_to_leave()
            ended, seconds = meeting.result()
    assert ended == "left"
    assert seconds < LEAVE_SECONDS, "later the agent would kill it"
