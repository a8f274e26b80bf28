"""Slots: what is valid is whole, also after a kill at any moment, a restart, a full volume or a flipped bit."""

import asyncio
import resource
import signal
import socket
from pathlib import Path

import pytest

from pipelinejob_worker.agent.zygote import Zygote
from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.recovery.pages import POPULATED_BYTES
from pipelinejob_worker.recovery.pieces import Piece
from pipelinejob_worker.recovery.slots import PAGE, SlotDamagedError, SlotMissingError, file_bytes
from tests.unit.worker.recovery.snapshots import FIRST, SECOND, bytes_of, content, filled, held, store_in, write
from tests.unit.worker.recovery.test_zygote import ENVIRONMENT


def test_a_snapshot_is_read_back_by_whoever_opens_the_directory_next(memory: Path) -> None:
    wanted = [held(0, 7), held(1, 7, size=5000), held(0, 8), held(3, 7, copied=True)]
    filled(memory, *wanted).close()
    store = store_in(memory)
    assert store.held() == sorted(wanted, key=lambda each: (each.copied, each.piece, each.step))
    assert [bytes_of(store, each) for each in wanted] == [content(each) for each in wanted]


def test_of_three_steps_the_two_newest_are_held(memory: Path) -> None:
    store = filled(memory, held(0, 1), held(0, 2), held(0, 3), held(0, 4))
    assert [each.step for each in store.held()] == [3, 4]


def test_an_invalid_slot_is_filled_before_the_older_one(memory: Path) -> None:
    store = filled(memory, held(0, 1), held(0, 2))
    store.invalidate(lambda each: each.step > 1)
    write(store, held(0, 2, SECOND))
    assert store.held() == [held(0, 1), held(0, 2, SECOND)]


def test_the_same_step_of_another_incarnation_is_replaced_and_the_step_before_kept(memory: Path) -> None:
    store = filled(memory, held(0, 1), held(0, 2))
    write(store, held(0, 2, SECOND))
    assert store.held() == [held(0, 1), held(0, 2, SECOND)]
    assert bytes_of(store, held(0, 2, SECOND)) == content(held(0, 2, SECOND))


def test_a_slot_that_is_being_filled_is_not_held_and_the_other_one_is(memory: Path) -> None:
    store = filled(memory, held(0, 1), held(0, 2))
    writing = store.begin(held(0, 3))
    assert store_in(memory).held() == [held(0, 2)]
    writing.payload[:] = content(held(0, 3))
    assert store_in(memory).held() == [held(0, 2)]
    writing.commit()
    assert store_in(memory).held() == [held(0, 2), held(0, 3)]


def test_what_is_held_already_or_older_than_both_slots_is_refused(memory: Path) -> None:
    store = filled(memory, held(0, 5), held(0, 6))
    with pytest.raises(ValueError, match=r"piece 0-0-1 of step 6, written by 1\.1, is held already"):
        store.begin(held(0, 6))
    with pytest.raises(ValueError, match="both slots hold newer steps than 4"):
        store.begin(held(0, 4))
    assert store.held() == [held(0, 5), held(0, 6)]


def test_own_pieces_and_copies_of_the_same_layer_do_not_meet(memory: Path) -> None:
    store = filled(memory, held(0, 1), held(0, 2, copied=True))
    assert bytes_of(store, held(0, 1)) == content(held(0, 1))
    assert bytes_of(store, held(0, 2, copied=True)) == content(held(0, 2))
    with pytest.raises(SlotMissingError, match="piece 0-0-1 of step 2 is not held"):
        store.read(Piece(0), 2, copied=False)


def test_a_flipped_bit_is_found_and_the_slot_is_dropped(memory: Path) -> None:
    store = filled(memory, held(0, 1), held(0, 2))
    (file,) = [path for path in memory.iterdir() if content(held(0, 2)) in path.read_bytes()]
    damaged = bytearray(file.read_bytes())
    damaged[PAGE + 500] ^= 4
    with file.open("r+b") as opened:  # in place: the file is mapped
        opened.write(damaged)
    with pytest.raises(SlotDamagedError, match="piece 0-0-1 of step 2: the checksum is wrong"):
        store.read(Piece(0), 2, copied=False)
    assert store.held() == [held(0, 1)]


@pytest.mark.parametrize("garbage", [b"", b"x" * 10, b"\xff" * PAGE * 2])
def test_a_file_that_is_no_slot_holds_nothing(memory: Path, garbage: bytes) -> None:
    store = filled(memory, held(0, 1))
    (memory / "own-1-0-1.0").write_bytes(garbage)
    assert store.held() == [held(0, 1)]
    store.reserve({Piece(1): 1000}, copied=False)
    write(store, held(1, 1))
    assert store.held() == [held(0, 1), held(1, 1)]


def test_another_job_and_another_boot_find_nothing(memory: Path) -> None:
    filled(memory, held(0, 1))
    assert store_in(memory).held() == [held(0, 1)]
    identity = memory / "identity"
    identity.write_text(identity.read_text().replace('"boot": "', '"boot": "another-'))
    assert store_in(memory).held() == []
    filled(memory, held(0, 1))
    assert store_in(memory, job_uid="uid-2").held() == []
    assert [path.name for path in memory.iterdir()] == ["identity"]


def test_all_memory_is_taken_at_once_and_a_volume_too_small_is_refused_before(memory: Path) -> None:
    sizes = {Piece(0): 10_000, Piece(1): 1}
    needed = file_bytes(sizes)
    assert needed == 2 * (4 * PAGE + 2 * PAGE)
    store = store_in(memory, limit_bytes=needed)
    store.reserve(sizes, copied=False)
    assert store.used_bytes() == needed
    assert sum(path.stat().st_blocks * 512 for path in memory.glob("own-*")) == needed, "nothing is sparse"
    with pytest.raises(ConfigurationError, match=rf"the snapshots need {needed + 2 * PAGE} bytes .* allowed: {needed}"):
        store.reserve({Piece(2): 0}, copied=True)
    assert store.used_bytes() == needed
    store.retain({Piece(0)}, set())
    store.reserve({Piece(2): 0}, copied=True)


def test_memory_is_there_before_it_is_written_if_asked_for(memory: Path) -> None:
    store, sizes = store_in(memory), {Piece(0): 3 * POPULATED_BYTES}
    store.reserve(sizes, copied=False, slots=1)
    store.populate(sizes, copied=False, slots=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    writing = store.begin(held(0, 1, size=3 * POPULATED_BYTES))
    writing.payload[::PAGE] = bytes(len(writing.payload[::PAGE]))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 3 * POPULATED_BYTES / PAGE / 2
    writing.payload.release()


def test_reserving_again_keeps_what_fits(memory: Path) -> None:
    store = filled(memory, held(0, 1), held(1, 1))
    store.reserve({Piece(0): 1000, Piece(1): 100_000}, copied=False)
    assert store.held() == [held(0, 1)]
    with pytest.raises(SlotMissingError, match="piece 0-0-1 has 5000 bytes; its slots hold 4096"):
        store.begin(held(0, 2, size=5000))


def test_a_file_that_the_other_process_has_made_anew_is_seen(memory: Path) -> None:
    worker, agent = filled(memory, held(0, 1)), store_in(memory)
    assert bytes_of(agent, held(0, 1)) == content(held(0, 1))
    worker.retain([], [])
    worker.reserve({Piece(0): 1000}, copied=False)
    write(worker, held(0, 1, SECOND))
    assert bytes_of(agent, held(0, 1)) == content(held(0, 1, SECOND))


def test_a_copy_that_is_adopted_is_an_own_piece_in_the_same_memory(memory: Path) -> None:
    older, newer = held(0, 1, copied=True), held(0, 2, SECOND, copied=True)
    store = filled(memory, held(0, 1), older, newer)
    before = inodes(memory)
    store.adopt(newer)
    assert store.held() == [held(0, 1), held(0, 2, SECOND), older]
    assert bytes_of(store, held(0, 2, SECOND)) == content(newer)
    assert inodes(memory) < before, "it has replaced a slot"
    write(store, held(0, 3))
    assert store.held() == [held(0, 2, SECOND), held(0, 3), older], "it counts as what begin has filled"


def test_of_an_adopted_copy_the_other_process_sees_the_new_file(memory: Path) -> None:
    worker, agent = filled(memory, held(0, 1), held(0, 2), held(0, 3, copied=True)), store_in(memory)
    assert bytes_of(worker, held(0, 1)) == content(held(0, 1))
    agent.adopt(held(0, 3, copied=True))
    assert bytes_of(worker, held(0, 3)) == content(held(0, 3))
    write(worker, held(0, 4))
    assert agent.held() == [held(0, 3), held(0, 4)]


def test_what_is_not_held_as_a_copy_or_is_own_already_is_not_adopted(memory: Path) -> None:
    store = filled(memory, held(0, 1), held(0, 1, copied=True), held(1, 1, copied=True))
    before = store.held()
    for missing in (held(0, 2, copied=True), held(1, 1, SECOND, copied=True), held(2, 1, copied=True)):
        with pytest.raises(SlotMissingError, match="is not held"):
            store.adopt(missing)
    with pytest.raises(ValueError, match="is held already"):
        store.adopt(held(0, 1, copied=True))
    assert store.held() == before


def test_damage_to_a_copy_is_found_when_it_is_read_as_an_own_piece(memory: Path) -> None:
    store = filled(memory, held(0, 1, copied=True))
    store.read(Piece(0), 1, copied=True)[0][500] ^= 1
    store.adopt(held(0, 1, copied=True))
    with pytest.raises(SlotDamagedError, match="the checksum is wrong"):
        store.read(Piece(0), 1, copied=False)
    assert store.held() == []


def test_useless_slots_of_the_same_size_are_used_again_with_their_pages(memory: Path) -> None:
    store = filled(memory, held(0, 1), held(0, 2), held(1, 1, copied=True), held(2, 1, size=9000, copied=True))
    before, room = inodes(memory), store.used_bytes()
    new = {Piece(4): 1000, Piece(5): 1000, Piece(6): 9000, Piece(7): 90_000}
    store.recycle(new, lambda place, step: place.piece != Piece(1) and step != 2)
    assert store.held() == [held(0, 2), held(1, 1, copied=True)], "what is not useless is as before"
    assert store.used_bytes() == room
    assert inodes(memory) == before, "no file is new"
    write(store, held(4, 2))
    write(store, held(6, 2, size=9000))
    assert bytes_of(store, held(4, 2)) == content(held(4, 2))
    for none_was_left in (held(5, 2), held(7, 2, size=90_000)):
        with pytest.raises(SlotMissingError, match="no slot is reserved"):
            write(store, none_was_left)
    store.reserve(new, copied=False, slots=1)
    assert {held(4, 2), held(6, 2, size=9000)} < set(store.held())


def test_slots_that_are_there_are_not_made_of_others(memory: Path) -> None:
    store = filled(memory, held(0, 1), held(1, 1))
    store.recycle({Piece(0): 1000}, lambda place, step: place.piece == Piece(1))
    assert store.held() == [held(0, 1), held(1, 1)]


def inodes(memory: Path) -> set[int]:
    return {path.stat().st_ino for path in memory.iterdir()}


async def test_a_kill_at_any_moment_leaves_a_whole_step_of_which_nothing_is_torn(memory: Path) -> None:
    zygote = await Zygote.start("tests.unit.worker.recovery.writers:work", ENVIRONMENT)
    last = 0
    try:
        for kill in range(20):
            ours, theirs = socket.socketpair()
            ours.setblocking(False)
            with ours:
                with theirs:
                    worker = await zygote.fork(theirs, 2)
                loop = asyncio.get_running_loop()
                await loop.sock_sendall(ours, str(memory).encode())
                assert await loop.sock_recv(ours, 16) == b"3 steps"
                await asyncio.sleep(kill * 0.00037)  # somewhere in a later step
                worker.send_signal(signal.SIGKILL)
                assert await worker.wait() == -signal.SIGKILL
            store = store_in(memory)
            valid = store.held()
            assert all(bytes_of(store, each) == content(each) for each in valid)
            whole = [step for step in {each.step for each in valid} if sum(each.step == step for each in valid) == 4]
            assert max(whole) >= last + 3, "at least those that were told"
            assert max(whole) >= max(each.step for each in valid) - 1
            last = max(each.step for each in valid)
            store.close()
    finally:
        await zygote.stop()
    assert all(each.written == FIRST for each in valid)
