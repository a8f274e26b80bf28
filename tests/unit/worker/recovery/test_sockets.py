"""A wait for a frozen peer ends within milliseconds when this process shuts down its own end of the connection."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed

from pipelinejob_worker.agent.charge import LEAVE_SECONDS
from pipelinejob_worker.pipeline.group import Meeting, PeerLostError, is_link_error, joined
from pipelinejob_worker.protocol import Membership
from pipelinejob_worker.recovery.pulse import Doing, Heart, LeaveError, Pulse
from pipelinejob_worker.recovery.sockets import shut_down, tcp_sockets
from tests.unit.worker import forked
from tests.unit.worker.agents import until
from tests.unit.worker.ranks import SILENCE_LIMIT

INCARNATION = "incarnation-1.1"


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


def test_a_listener_is_not_shut_down() -> None:
    before = tcp_sockets()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert shut_down(spare=before) == 0
        with socket.create_connection(listener.getsockname()):
            listener.accept()[0].close()


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


def _meet(path: Path, port: int, rank: int, ranks: int) -> tuple[str, float]:
    """Try to form a group of whose ranks not all come; return what ended that, and how long after the order to leave.

    Who is in the group although one has not come all the way leaves at once, too.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    pulse = Pulse.open(path)
    before, ordered = tcp_sockets(), [0.0]

    def leave() -> None:
        ordered[0] = ordered[0] or time.monotonic()
        shut_down(spare=before)

    heart = Heart(pulse, leave)
    membership = Membership(epoch=1, action="Run", stage=rank, stages=ranks, master_address="127.0.0.1", master_port=1)
    try:
        with joined(membership, torch.device("cpu"), Meeting(INCARNATION, port, None, pulse)) as group:
            while True:
                group.computing()
    except LeaveError:
        ended = "left"
    except PeerLostError:
        ended = "lost"
    finally:
        heart.stop()
    return ended, time.monotonic() - ordered[0] if ordered[0] else 0.0


@pytest.mark.parametrize("listens", [True, False], ids=["a master that never answers", "a master that is gone"])
def test_who_waits_for_the_store_leaves_when_it_is_ordered_to(tmp_path: Path, listens: bool) -> None:
    pulse = Pulse.create(tmp_path / "pulse")
    with socket.create_server(("127.0.0.1", 0)) as master:
        port = master.getsockname()[1]
        if not listens:
            master.close()
        with ThreadPoolExecutor(1) as thread:
            meeting = thread.submit(forked.call, _meet, tmp_path / "pulse", port, 1, 2)
            until(lambda: pulse.signs().doing == Doing.WAITING)
            pulse.order_to_leave()
            ended, seconds = meeting.result()
    assert ended == "left"
    assert seconds < LEAVE_SECONDS, "later the agent would kill it"


class Dying(distributed.Store):  # type: ignore[misc]
    """A store whose user dies before one of the operations by which the ranks exchange their addresses."""

    def __init__(self, store: distributed.Store, operations: int) -> None:
        super().__init__()
        self._store = store
        self._left = operations

    def _count(self) -> None:
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self._left -= 1

    def set(self, key: str, value: bytes) -> None:
        self._count()
        self._store.set(key, value)

    def wait(self, keys: list[str], *timeout: timedelta) -> None:
        self._count()
        self._store.wait(keys, *timeout)

    def get(self, key: str) -> bytes:
        self._count()
        return bytes(self._store.get(key))


def _die_while_forming(port: int, rank: int, ranks: int, operations: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = distributed.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    store = Dying(distributed.PrefixStore(INCARNATION, store), operations)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=SILENCE_LIMIT)
    raise AssertionError(f"it has formed the group with {operations} operations of the store")


@pytest.mark.parametrize("victim", [1, 2])
@pytest.mark.parametrize("operations", range(7), ids=lambda count: f"after {count} operations")
def test_who_waits_for_a_rank_that_died_while_the_group_formed_leaves_when_it_is_ordered_to(
    tmp_path: Path, operations: int, victim: int
) -> None:
    """The address told, and then for each rank its address awaited and read, and a connection made."""
    port, survivors = forked.free_port(), [rank for rank in range(3) if rank != victim]
    pulses = [Pulse.create(tmp_path / str(rank)) for rank in survivors]
    with ThreadPoolExecutor(3) as threads:
        forming = [threads.submit(forked.call, _meet, tmp_path / str(rank), port, rank, 3) for rank in survivors]
        with pytest.raises(EOFError):
            forked.call(_die_while_forming, port, victim, 3, operations)
        for pulse in pulses:
            pulse.order_to_leave()
        ended = [each.result() for each in forming]
    assert all(seconds < LEAVE_SECONDS for _, seconds in ended), "later the agent would kill it"
