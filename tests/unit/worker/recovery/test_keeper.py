"""What an agent keeps: its successor in the same pod finds it, and nothing is kept for longer than it is needed."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest

from pipelinejob_worker.protocol import FAILURES_KEPT, FailureRecord
from pipelinejob_worker.recovery import keeper as keeper_module
from pipelinejob_worker.recovery.agreement import Holding
from pipelinejob_worker.recovery.deadlines import Crash
from pipelinejob_worker.recovery.keeper import Keeper
from pipelinejob_worker.recovery.memory import CRASHES_KEPT, Memory, load, save
from pipelinejob_worker.recovery.messages import Plan
from pipelinejob_worker.recovery.pieces import Incarnation, Lineage
from pipelinejob_worker.recovery.slots import SlotStore
from pipelinejob_worker.recovery.transport import Address
from tests.unit.worker.recovery.snapshots import FIRST, filled, held, until, write

Start = Callable[[int], Keeper]


@pytest.fixture
async def start(memory: Path) -> AsyncIterator[Start]:
    keepers: list[Keeper] = []

    def make(rank: int) -> Keeper:
        (memory / str(rank)).mkdir(exist_ok=True)
        keepers.append(
            Keeper(memory / str(rank), job_uid="uid-1", rank=rank, limit_bytes=1 << 30, guarded=guarded[rank].append)
        )
        return keepers[-1]

    yield make
    for keeper in keepers:
        await keeper.stop()
    for steps in guarded.values():
        steps.clear()


guarded: dict[int, list[int]] = {0: [], 1: []}
"""Steps that the guards of the ranks have acknowledged."""


def plan(
    *addresses: Address, step: int | None, incarnation: Incarnation = FIRST, holdings: Sequence[Holding] = ()
) -> Plan:
    return Plan(
        incarnation=incarnation,
        step=step,
        lineage=Lineage().rolled_back(incarnation, step or 0),
        holdings=list(holdings),
        addresses=list(addresses),
        guards=[1, 0],
        rendezvous_port=1,
    )


NOWHERE = Address("127.0.0.1", 9)


async def test_a_plan_is_written_down_and_what_it_makes_void_is_invalid(memory: Path, start: Start) -> None:
    filled(memory / "0", held(0, 6), held(0, 7), held(1, 6, copied=True), held(1, 7, copied=True)).close()
    keeper = start(0)
    await keeper.apply(plan(NOWHERE, NOWHERE, step=6, incarnation=Incarnation(1, 2)))
    successor = start(0).join(epoch=1, world_size=2, leaving=1, node="node-1", address=NOWHERE)
    assert successor.held == [held(0, 6), held(1, 6, copied=True)]
    assert successor.last == Incarnation(1, 2)
    assert successor.lineage == plan(NOWHERE, step=6, incarnation=Incarnation(1, 2)).lineage
    assert successor.present == 3


async def test_a_plan_without_a_step_makes_everything_void(memory: Path, start: Start) -> None:
    filled(memory / "0", held(0, 6), held(1, 6, copied=True)).close()
    keeper = start(0)
    await keeper.apply(plan(NOWHERE, NOWHERE, step=None))
    assert keeper.store.held() == []


async def test_without_what_was_written_down_the_slots_are_worth_nothing(memory: Path, start: Start) -> None:
    filled(memory / "0", held(0, 6)).close()
    (memory / "0" / "memory.json").write_text('{"incarnation": ')
    keeper = start(0)
    assert keeper.store.held() == []
    assert keeper.memory == Memory()


async def test_a_guard_that_cannot_be_reached_is_told_and_tried_again(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "RETRY_SECONDS", 0.01)
    owner, guard = start(0), start(1)
    port = guard.start("127.0.0.1")
    owner.store.reserve({held(0, 1).piece: 1000}, copied=False)
    await owner.apply(plan(NOWHERE, Address("127.0.0.1", port), step=None))
    write(owner.store, held(0, 1))
    await guard._server.stop()
    owner.protect(1)
    await until(lambda: bool(owner.guard_problem))
    assert owner.guard_problem.startswith(f"rank 1 does not keep the copy of step 1: 127.0.0.1:{port}: ")
    assert guarded[0] == []
    await guard.apply(plan(NOWHERE, NOWHERE, step=None))
    guard.start("127.0.0.1", port)
    await until(lambda: bool(guarded[0]))
    assert guarded[0] == [1]
    assert owner.guard_problem == ""
    assert guard.store.held() == [held(0, 1, copied=True)]


async def test_with_the_first_snapshot_above_the_plans_step_other_pieces_are_given_up(
    memory: Path, start: Start
) -> None:
    filled(memory / "0", held(0, 6), held(1, 6), held(2, 6, copied=True), held(3, 6, copied=True)).close()
    filled(memory / "1", held(3, 6)).close()
    keeper, other = start(0), start(1)
    addresses = [Address("127.0.0.1", each.start("127.0.0.1")) for each in (keeper, other)]
    for each in (keeper, other):
        await each.apply(plan(*addresses, step=6, incarnation=Incarnation(1, 2)))
        each.protect(6)
    await until(lambda: bool(guarded[0] and guarded[1]))
    assert {each.piece.layer for each in keeper.store.held()} == {0, 1, 2, 3}, "nothing is given up yet"
    write(keeper.store, held(0, 7, Incarnation(1, 2)))
    keeper.protect(7)
    await until(lambda: {(each.piece.layer, each.copied) for each in keeper.store.held()} == {(0, False), (3, True)})
    assert keeper.join(epoch=1, world_size=2, leaving=1, node="", address=NOWHERE).present == 2


async def test_layers_that_another_split_has_taken_from_a_rank_are_not_copied_for_it(
    memory: Path, start: Start
) -> None:
    """Their new owner has them copied, and a guard may have no room for both."""
    filled(memory / "0", held(0, 6), held(1, 6)).close()
    filled(memory / "1", held(2, 6), held(3, 6)).close()
    keeper, other = start(0), start(1)
    addresses = [Address("127.0.0.1", each.start("127.0.0.1")) for each in (keeper, other)]
    here = [Holding(rank=rank, held=each) for rank, of in enumerate((keeper, other)) for each in of.store.held()]
    for each in (keeper, other):
        await each.apply(plan(*addresses, step=6, holdings=here))
        await each.fetch({0: [0], 1: [1, 2, 3]})
        each.protect(6)
    await until(lambda: bool(guarded[0] and guarded[1]))
    assert [each.piece.layer for each in other.store.held() if each.copied] == [0]
    assert [each.piece.layer for each in keeper.store.held() if each.copied] == [1, 2, 3]


@pytest.mark.parametrize("twice", [True, False])
async def test_slots_of_former_layers_and_copies_are_used_again_once_their_step_is_of_no_use(
    memory: Path, start: Start, twice: bool
) -> None:
    own = [held(layer, step) for layer in (0, 1) for step in (5, 6)]
    copies = [held(3, step, copied=True) for step in (4, 5)]
    filled(memory / "0", *own, *copies).close()
    filled(memory / "1", held(2, 6), held(3, 6)).close()
    keeper, other = start(0), start(1)
    addresses = [Address("127.0.0.1", each.start("127.0.0.1")) for each in (keeper, other)]
    here = [Holding(rank=rank, held=each) for rank, of in enumerate((keeper, other)) for each in of.store.held()]
    newest = [holding for holding in here if holding.held.step == 6]
    elsewhere = [Holding(rank=2, held=holding.held) for holding in newest] if twice else []
    for each in (keeper, other):
        await each.apply(plan(*addresses, NOWHERE, step=6, holdings=[*newest, *elsewhere]))
    await keeper.fetch({0: [0, 2], 1: [1, 3], 2: []})
    kept = keeper.store.held()
    assert {held(0, 5), held(0, 6), held(1, 6), held(2, 6)} < set(kept)
    older = [each for each in kept if each in (held(1, 5), *copies)]
    assert len(older) == (2 if twice else 3), "older steps are what is left if this one is lost with a rank"


async def test_a_slot_that_is_reserved_for_a_copy_is_not_used_for_another_piece(memory: Path, start: Start) -> None:
    filled(memory / "0", held(0, 6)).close()
    filled(memory / "1", held(1, 6)).close()
    keeper, other = start(0), start(1)
    addresses = [Address("127.0.0.1", each.start("127.0.0.1")) for each in (keeper, other)]
    here = [Holding(rank=rank, held=each) for rank, of in enumerate((keeper, other)) for each in of.store.held()]
    for each in (keeper, other):
        await each.apply(plan(*addresses, step=6, holdings=here))
    other.protect(6)
    await until(lambda: bool(guarded[1]))
    before = {path.name: path.stat().st_ino for path in (memory / "0").glob("copy-*")}
    await keeper.fetch({0: [0, 1], 1: [1]})
    assert {path.name: path.stat().st_ino for path in (memory / "0").glob("copy-*")} == before


async def test_no_incarnation_begins_while_pieces_are_given_up(
    memory: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or it could lose those that it has just reserved."""
    begun, may_end = threading.Event(), threading.Event()

    def retain(_self: SlotStore, _own: object, _copies: object) -> None:
        begun.set()
        assert may_end.wait(30)

    monkeypatch.setattr(SlotStore, "retain", retain)
    filled(memory / "0", held(0, 6)).close()
    keeper = start(0)
    addresses = (Address("127.0.0.1", keeper.start("127.0.0.1")), NOWHERE)
    await keeper.apply(plan(*addresses, step=6, incarnation=Incarnation(1, 2)))
    write(keeper.store, held(0, 7, Incarnation(1, 2)))
    keeper.protect(7)
    next_one = asyncio.create_task(keeper.apply(plan(*addresses, step=7, incarnation=Incarnation(1, 3))))
    await until(begun.is_set)
    done, _ = await asyncio.wait([next_one], timeout=0.2)
    assert not done
    may_end.set()
    await next_one
    assert keeper.memory.incarnation == Incarnation(1, 3)


def test_crashes_and_the_last_causes_are_kept_within_bounds(memory: Path) -> None:
    written = Memory()
    for number in range(CRASHES_KEPT + 5):
        cause = FailureRecord(rank=1, at=float(number), exit_code=139, reason="Signal", log_tail=("a", "b"))
        written = written.failed(cause, Crash(at=float(number), step=number))
    written = written.failed(FailureRecord(rank=1, at=1000.0, reason="PeerLost"), None)
    save(memory, written)
    read = load(memory)
    assert read == written
    assert [crash.step for crash in read.crashes] == list(range(5, CRASHES_KEPT + 5))
    assert len(read.failures) == FAILURES_KEPT
    assert read.failures[-1].reason == "PeerLost"
