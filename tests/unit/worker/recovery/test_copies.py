"""Copies over real sockets: whole or invalid, for members only, and nothing travels twice."""

import asyncio
import json
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest

from pipelinejob_worker.agent.zygote import Zygote
from pipelinejob_worker.recovery import copies, transport
from pipelinejob_worker.recovery.agreement import Fetch
from pipelinejob_worker.recovery.copies import PieceClient
from pipelinejob_worker.recovery.piece_server import PieceServer
from pipelinejob_worker.recovery.pieces import Held, Incarnation, Piece
from pipelinejob_worker.recovery.requests import Get, Greeting, Put
from pipelinejob_worker.recovery.slots import PAGE, SlotStore
from pipelinejob_worker.recovery.transport import CHUNK_BYTES, Address, Connection, Pacer, Traffic, TransferError
from tests.unit.worker.recovery.snapshots import FIRST, SECOND, bytes_of, content, filled, held, store_in, until, write
from tests.unit.worker.recovery.test_zygote import ENVIRONMENT

BIG = 3_000_000


@dataclass
class Agent:
    """One rank's store, served to the others."""

    store: SlotStore
    server: PieceServer
    client: PieceClient
    address: Address

    @property
    def received(self) -> int:
        return self.server.traffic.received + self.client.traffic.received


Start = Callable[..., Awaitable[Agent]]


@pytest.fixture
async def start(memory: Path) -> AsyncIterator[Start]:
    """Start the agent of a rank with some pieces."""
    agents: list[Agent] = []

    async def start_one(*pieces: Held, incarnation: Incarnation = FIRST, **store: int) -> Agent:
        rank = len(agents)
        directory = memory / str(rank)
        filled(directory, *pieces).close()
        mine = store_in(directory, **store)
        server = PieceServer(mine, "uid-1")
        address = Address("127.0.0.1", server.start("127.0.0.1"))
        await server.advance(incarnation)
        agents.append(Agent(mine, server, PieceClient(mine, "uid-1", rank), address))
        return agents[-1]

    yield start_one
    for agent in agents:
        await agent.server.stop()


def copy_of(what: Held) -> Held:
    return what.model_copy(update={"copied": True})


async def test_the_guard_holds_what_it_has_been_sent(start: Start) -> None:
    pieces = [held(0, 4), held(1, 4, size=BIG), held(2, 4, size=0)]
    owner, guard = await start(*pieces), await start(held(3, 4))
    await owner.client.guard(guard.address, FIRST, pieces)
    assert [each for each in guard.store.held() if each.copied] == [copy_of(each) for each in pieces]
    assert all(bytes_of(guard.store, copy_of(each)) == content(each) for each in pieces)
    assert guard.store.held()[0] == held(3, 4), "its own are as before"
    assert owner.client.traffic.sent == guard.server.traffic.received == 1000 + BIG


async def test_what_the_guard_holds_already_does_not_travel_again(start: Start) -> None:
    pieces = [held(0, 4), held(1, 4)]
    owner, guard = await start(*pieces), await start()
    await owner.client.guard(guard.address, FIRST, pieces[:1])
    await owner.client.guard(guard.address, FIRST, pieces)
    await owner.client.guard(guard.address, FIRST, pieces)
    assert owner.client.traffic.sent == 2000


async def test_of_a_guarded_rank_the_two_newest_steps_are_held(start: Start) -> None:
    owner, guard = await start(held(0, 1)), await start()
    for step in (1, 2, 3):
        if step > 1:
            write(owner.store, held(0, step))
        await owner.client.guard(guard.address, FIRST, [held(0, step)])
    assert [each.step for each in guard.store.held()] == [2, 3]


async def test_copies_go_on_over_the_connections_that_are_there(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a pod that is deleted and lives: a network policy refuses its new connections only."""
    owner, guard = await start(held(0, 1), held(1, 1)), await start()
    await owner.client.guard(guard.address, FIRST, [held(0, 1), held(1, 1)])
    with monkeypatch.context() as patched:
        patched.setattr(copies, "connect", refused)
        for step in (2, 3):
            for layer in (0, 1):
                write(owner.store, held(layer, step))
            await owner.client.guard(guard.address, FIRST, [held(0, step), held(1, step)])
    assert [each.step for each in guard.store.held()] == [2, 3, 2, 3]
    assert guard.server.connections == 2
    owner.client.release()
    await until(lambda: guard.server.connections == 0)


async def refused(address: Address) -> socket.socket:
    raise ConnectionRefusedError(f"no new connection to {address}")


async def test_a_connection_of_an_older_incarnation_is_not_used_again(start: Start) -> None:
    owner, guard = await start(held(0, 1)), await start()
    await owner.client.guard(guard.address, FIRST, [held(0, 1)])
    await guard.server.advance(SECOND)
    write(owner.store, held(0, 2, SECOND))
    await owner.client.guard(guard.address, SECOND, [held(0, 2, SECOND)])
    assert guard.store.held() == [held(0, 1, copied=True), held(0, 2, SECOND, copied=True)]
    await until(lambda: guard.server.connections == 1)


async def test_a_guard_that_has_given_up_its_slots_is_asked_for_them_again(start: Start) -> None:
    owner, guard = await start(held(0, 1)), await start()
    await owner.client.guard(guard.address, FIRST, [held(0, 1)])
    guard.store.retain([], [])
    write(owner.store, held(0, 2))
    with pytest.raises(TransferError, match="no slot is reserved for piece 0-0-1"):
        await owner.client.guard(guard.address, FIRST, [held(0, 2)])
    await owner.client.guard(guard.address, FIRST, [held(0, 2)])
    assert guard.store.held() == [held(0, 2, copied=True)]


async def test_whoever_recovers_fetches_from_owners_and_guards_and_copies_at_hand_do_not_travel(start: Start) -> None:
    at_hand, far, guarded = held(0, 4, copied=True), held(1, 4, size=BIG), held(2, 4, copied=True)
    new = await start(at_hand)
    owner, guard = await start(far), await start(guarded)
    fetches = [Fetch(at_hand, 0), Fetch(far, 1), Fetch(guarded, 2)]
    await new.client.fetch({1: owner.address, 2: guard.address}, FIRST, fetches)
    own = [each for each in new.store.held() if not each.copied]
    assert own == [held(0, 4), held(1, 4, size=BIG), held(2, 4)]
    assert all(bytes_of(new.store, each) == content(each) for each in own)
    assert new.received == BIG + 1000
    assert (owner.server.traffic.sent, guard.server.traffic.sent) == (BIG, 1000)


@pytest.mark.parametrize("many", [1, 4])
async def test_many_pieces_arrive_over_any_number_of_connections(start: Start, many: int) -> None:
    pieces = [held(layer, 1, size=100 + layer) for layer in range(25)]
    owner, new = await start(*pieces), await start()
    await new.client.fetch({0: owner.address}, FIRST, [Fetch(each, 0) for each in pieces], connections=many)
    assert new.store.held() == pieces


async def test_another_job_is_refused(start: Start) -> None:
    guard, owner = await start(), await start(held(0, 1))
    stranger = PieceClient(owner.store, "uid-2", 1)
    with pytest.raises(TransferError, match="job uid-2 is not job uid-1"):
        await stranger.guard(guard.address, FIRST, [held(0, 1)])
    assert guard.store.held() == []


async def test_an_older_incarnation_is_refused(start: Start) -> None:
    guard, owner = await start(incarnation=SECOND), await start(held(0, 1))
    with pytest.raises(TransferError, match=r"incarnation 1\.1 is not 1\.2"):
        await owner.client.guard(guard.address, FIRST, [held(0, 1)])
    with pytest.raises(TransferError, match=r"incarnation 1\.1 is not 1\.2"):
        await owner.client.fetch({0: guard.address}, FIRST, [Fetch(held(1, 1), 0)])


async def test_whoever_has_heard_of_a_new_incarnation_first_waits_for_the_other(start: Start) -> None:
    owner, new = await start(held(0, 1)), await start()
    fetching = asyncio.create_task(new.client.fetch({0: owner.address}, SECOND, [Fetch(held(0, 1), 0)]))
    await until(lambda: bool(owner.server.connections))
    assert not fetching.done()
    await owner.server.advance(SECOND)
    await fetching
    assert new.store.held() == [held(0, 1)]


async def test_a_new_incarnation_cuts_off_the_transfers_of_the_old_one(start: Start) -> None:
    piece = held(0, 2, size=BIG)
    owner, guard = await start(held(0, 1, size=BIG), piece), await start()
    await owner.client.guard(guard.address, FIRST, [held(0, 1, size=BIG)])
    slowly = asyncio.create_task(owner.client.guard(guard.address, FIRST, [piece], bytes_per_second=1_000_000))
    await until(lambda: guard.server.traffic.received > BIG)
    await guard.server.advance(SECOND)
    arrived = guard.server.traffic.received
    with pytest.raises(TransferError):
        await slowly
    assert guard.server.traffic.received == arrived
    assert [each.step for each in guard.store.held()] == [1], "the new one is not valid, the one before is"


async def test_a_sender_that_begins_again_displaces_its_own_older_connection(start: Start) -> None:
    piece = held(0, 2, size=BIG)
    owner, guard = await start(piece), await start()
    slowly = asyncio.create_task(owner.client.guard(guard.address, FIRST, [piece], bytes_per_second=1_000_000))
    await until(lambda: guard.server.traffic.received > 0)
    await owner.client.guard(guard.address, FIRST, [piece])
    with pytest.raises(TransferError):
        await slowly
    assert bytes_of(guard.store, copy_of(piece)) == content(piece)


async def test_a_sender_killed_in_mid_transfer_leaves_the_step_before(start: Start, memory: Path) -> None:
    before, torn = held(0, 1, size=BIG), held(0, 2, size=BIG)
    owner, guard = await start(before), await start()
    await owner.client.guard(guard.address, FIRST, [before])
    write(owner.store, torn)
    zygote = await Zygote.start("tests.unit.worker.recovery.senders:work", ENVIRONMENT)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender = await zygote.fork(theirs, 2)
        ours.sendall(json.dumps([str(memory / "0"), guard.address.port, 1_000_000]).encode())
        await until(lambda: guard.server.traffic.received > BIG)
        assert [each.step for each in guard.store.held()] == [1]
        sender.send_signal(signal.SIGKILL)
        await sender.wait()
    await until(lambda: guard.server.connections == 1)  # the owner's, which is kept
    assert guard.server.traffic.received < 2 * BIG
    assert guard.store.held() == [copy_of(before)]
    await owner.client.guard(guard.address, FIRST, [torn])
    assert [each.step for each in guard.store.held()] == [1, 2]
    await zygote.stop()


async def test_a_slot_that_is_overwritten_while_it_is_sent_is_not_taken_for_whole(start: Start) -> None:
    pieces = [held(0, step, size=BIG) for step in (1, 2)]
    owner, guard = await start(*pieces), await start()
    slowly = asyncio.create_task(owner.client.guard(guard.address, FIRST, pieces[:1], bytes_per_second=5_000_000))
    await until(lambda: guard.server.traffic.received > 0)
    write(owner.store, held(0, 3, size=BIG))
    with pytest.raises(TransferError, match="piece 0-0-1 of step 1 has changed on its way"):
        await slowly
    assert guard.store.held() == []


async def test_a_damaged_source_fails_the_fetch_and_is_no_source_any_more(start: Start, memory: Path) -> None:
    owner, new = await start(held(0, 1), held(0, 2)), await start()
    (file,) = [path for path in (memory / "0").iterdir() if content(held(0, 2)) in path.read_bytes()]
    with file.open("r+b") as opened:
        opened.seek(PAGE + 10)
        opened.write(b"other")
    with pytest.raises(TransferError, match="the checksum is wrong"):
        await new.client.fetch({0: owner.address}, FIRST, [Fetch(held(0, 2), 0)])
    assert new.store.held() == []
    assert owner.store.held() == [held(0, 1)], "the next attempt takes an older step, or another holder"


async def test_a_copy_at_hand_becomes_an_own_piece_in_the_same_memory(start: Start) -> None:
    at_hand = held(0, 4, size=BIG, copied=True)
    new = await start(at_hand)
    room = new.store.used_bytes()
    await new.client.fetch({}, FIRST, [Fetch(at_hand, 0, sole=True)])
    assert new.store.held() == [held(0, 4, size=BIG)]
    assert bytes_of(new.store, held(0, 4, size=BIG)) == content(at_hand)
    assert new.store.used_bytes() == room


async def test_a_copy_of_a_layer_that_others_need_too_is_kept_for_its_owner(start: Start) -> None:
    """Each pipeline's copy of a stage owns the layer then, and may be asked to guard another's."""
    at_hand = held(0, 4, copied=True)
    new = await start(at_hand)
    await new.client.fetch({}, FIRST, [Fetch(at_hand, 0, sole=False)])
    assert new.store.held() == [held(0, 4), at_hand]


async def test_a_copy_that_its_holder_has_adopted_meanwhile_is_given_all_the_same(start: Start) -> None:
    told = held(0, 4, copied=True)
    holder, new = await start(told), await start()
    holder.store.adopt(told)
    await new.client.fetch({0: holder.address}, FIRST, [Fetch(told, 0)])
    assert bytes_of(new.store, held(0, 4)) == content(told)


async def test_a_damaged_copy_is_not_duplicated_but_dropped(start: Start) -> None:
    new = await start(held(0, 4, copied=True))
    new.store.read(Piece(0), 4, copied=True)[0][500] ^= 1
    with pytest.raises(TransferError, match="the checksum is wrong"):
        await new.client.fetch({}, FIRST, [Fetch(held(0, 4, copied=True), 0)])
    assert new.store.held() == []


async def test_a_guard_without_room_says_so(start: Start) -> None:
    owner, guard = await start(held(0, 1, size=BIG)), await start(limit_bytes=BIG)
    with pytest.raises(TransferError, match=r"spec.recovery: the snapshots need \d+ bytes .* allowed: 3000000 in all"):
        await owner.client.guard(guard.address, FIRST, [held(0, 1, size=BIG)])


async def test_what_is_not_held_is_refused_and_the_connection_goes_on(start: Start) -> None:
    owner, new = await start(held(0, 1)), await start()
    for wrong in (held(0, 2), held(1, 1), held(0, 1, SECOND), held(1, 1, copied=True), held(0, 1, size=7)):
        with pytest.raises(TransferError, match="is not held"):
            await new.client.fetch({0: owner.address}, FIRST, [Fetch(wrong, 0)])
    await new.client.fetch({0: owner.address}, FIRST, [Fetch(held(0, 1), 0)])


async def test_nobody_there_is_an_error_that_names_the_address(start: Start) -> None:
    new = await start()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(TransferError, match=f"127.0.0.1:{port}: .*Connect call failed"):
        await new.client.fetch({5: Address("127.0.0.1", port)}, FIRST, [Fetch(held(0, 1), 5)])


async def test_a_peer_that_moves_nothing_is_given_up(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "STALL_SECONDS", 0.1)
    new = await start()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = Address("127.0.0.1", silent.getsockname()[1])
        with pytest.raises(TransferError, match=r"127.0.0.1:\d+: nothing moved for"):
            await new.client.fetch({5: address}, FIRST, [Fetch(held(0, 1), 5)])


def frame(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def hello(rank: int = 0) -> bytes:
    return frame(Greeting(job_uid="uid-1", incarnation=FIRST, rank=rank).to_json().encode())


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff\xff\xff\xff",
        bytes(4),
        frame(b"{}"),
        frame(b"not json"),
        frame(b'{"jobUid":"uid-1","incarnation":[1,1],"rank":-1}'),
        hello() + frame(b'{"kind":"unknown"}'),
        hello() + frame(b'{"kind":"get","held":{"piece":[0,0,9999999],"step":1,"written":[1,1],"size":1,"layers":1}}'),
        hello() + frame(Put(held=held(0, 1), checksum=1).to_json().encode().replace(b"1000", b"-1")),
        hello()[:-1],
    ],
)
async def test_nonsense_ends_the_connection_and_nothing_else(start: Start, garbage: bytes) -> None:
    agent, other = await start(held(0, 1)), await start()
    reader, writer = await asyncio.open_connection(*agent.address)
    writer.write(garbage)
    writer.write_eof()
    with suppress(ConnectionResetError):  # what the server has not read
        await reader.read()
    writer.close()
    await until(lambda: not agent.server.connections)
    await other.client.fetch({0: agent.address}, FIRST, [Fetch(held(0, 1), 0)])


async def test_a_put_that_was_never_reserved_is_refused(start: Start) -> None:
    agent = await start()
    reader, writer = await asyncio.open_connection(*agent.address)
    writer.write(hello() + frame(Put(held=held(9, 1), checksum=0).to_json().encode()))
    writer.write(frame(Get(held=held(9, 1)).to_json().encode()))
    writer.write_eof()
    answers = await reader.read()
    assert answers.count(b"refused") == 2
    assert b"no slot is reserved for piece 9-0-1" in answers
    writer.close()


async def test_a_peer_that_never_lets_wait_leaves_others_their_turn() -> None:
    """As where pages come slower than data: heartbeats have to go out all the same."""
    size, turns = 8 * CHUNK_BYTES, 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    with socket.socket() as unconnected:
        counting = asyncio.create_task(count())
        connection = Connection(unconnected, Traffic())
        connection._loop = cast(asyncio.AbstractEventLoop, Ready())
        await connection.send_payload(memoryview(bytes(size)))
        assert turns >= size / CHUNK_BYTES
        turns = 0
        await connection.receive_payload(memoryview(bytearray(size)))
        assert turns >= size / CHUNK_BYTES - 1
        counting.cancel()


class Ready:
    """A loop whose sockets always have data and room."""

    async def sock_sendall(self, _socket: socket.socket, data: memoryview) -> None:
        """All of it."""

    async def sock_recv_into(self, _socket: socket.socket, memory: memoryview) -> int:
        return len(memory)


def test_a_pace_spreads_bytes_evenly_and_does_not_save_up_for_bursts() -> None:
    pacer = Pacer(1000)
    assert [pacer.delay(500, now) for now in (10.0, 10.0, 10.0)] == [0.0, 0.5, 1.0]
    assert pacer.delay(500, 100.0) == 0.0
    assert pacer.delay(500, 100.0) == 0.5
    assert Pacer(0).delay(10**12, 0.0) == 0.0
