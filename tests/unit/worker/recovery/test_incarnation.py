"""The coordinator: who may join, what it waits for, whom it blames. Messages in, messages out."""

from collections.abc import Mapping

import pytest

from pipelinejob_worker.protocol import FAILURES_KEPT, FailureRecord
from pipelinejob_worker.recovery.agreement import Holding
from pipelinejob_worker.recovery.cut import Cut
from pipelinejob_worker.recovery.incarnation import Coordinator, Failure, Outgoing
from pipelinejob_worker.recovery.messages import (
    TO_COORDINATOR,
    TO_MEMBER,
    Abort,
    Applied,
    Broken,
    Done,
    Finished,
    Holds,
    Join,
    Plan,
    Released,
    Settled,
    Start,
    ToCoordinator,
    to_line,
)
from pipelinejob_worker.recovery.pieces import NEVER, Held, Incarnation, Lineage, Piece
from pipelinejob_worker.recovery.transport import Address

FIRST = Incarnation(3, 1)


def join(rank: int, last: Incarnation = NEVER, *, leaving: int = 0, size: int = 3, **fields: object) -> Join:
    values = {"job_uid": "uid-1", "epoch": 3, "node": f"node-{rank}"} | fields
    return Join.model_validate(
        {"rank": rank, "world_size": size, "present": size + leaving, "address": ("10.0.0.1", rank), "last": last}
        | values
    )


def coordinator(size: int = 3) -> Coordinator:
    return Coordinator("uid-1", 3, size, lambda incarnation: 30_000 + incarnation.attempt)


def planned(*joins: Join, size: int = 3) -> tuple[Coordinator, Mapping[int, object]]:
    """A coordinator that all have joined, and what it says to that."""
    mine = coordinator(size)
    said: Outgoing = {}
    for each in joins or [join(rank) for rank in range(size)]:
        assert said == {}
        said = mine.join(each)
    return mine, said


def started() -> Coordinator:
    mine, _ = planned()
    for rank in range(3):
        mine.applied(rank, Applied(incarnation=FIRST))
    assert mine.started
    return mine


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"job_uid": "uid-2"}, "job uid-2 is not job uid-1"),
        ({"epoch": 2}, "epoch 2 is not 3"),
        ({"epoch": 4}, "epoch 4 is not 3"),
        ({"world_size": 4}, "rank 0 of 4, 3 present, is none of 3"),
        ({"world_size": 4, "rank": 3}, "rank 3 of 4, 3 present, is none of 3"),
    ],
)
def test_who_is_of_another_job_epoch_or_size_is_refused(wrong: dict[str, object], reason: str) -> None:
    refused = coordinator().refusal(join(0).model_copy(update=wrong))
    assert refused
    assert refused.reason == reason
    assert coordinator().refusal(join(0)) is None


def test_nothing_happens_before_all_have_joined() -> None:
    mine = coordinator()
    assert mine.join(join(2)) == mine.join(join(0)) == {}
    assert mine.missing == [1]
    assert mine.gone(2, "closed") == {}
    assert mine.missing == [1, 2]
    mine.join(join(1))
    said = mine.join(join(2))
    assert said.keys() == {0, 1, 2}
    assert mine.missing == []


def test_the_plan_names_the_step_the_places_and_the_guards() -> None:
    def held(step: int) -> Held:
        return Held(piece=Piece(0), step=step, written=Incarnation(2, 9), size=5, layers=1)

    _, said = planned(join(0), join(1, held=[held(7), held(8)]), join(2, held=[held(7)]))
    plan = said[0]
    assert isinstance(plan, Plan)
    assert said == dict.fromkeys(range(3), plan)
    assert (plan.incarnation, plan.step, plan.rendezvous_port) == (FIRST, 8, 30_001)
    assert [holding.rank for holding in plan.holdings] == [1]
    assert plan.addresses == [Address("10.0.0.1", rank) for rank in range(3)]
    assert plan.guards == [1, 2, 0]
    assert not plan.lineage.counts(held(9))


def test_the_attempt_is_newer_than_any_that_a_rank_has_seen_in_this_epoch() -> None:
    _, said = planned(join(0, Incarnation(2, 50)), join(1, Incarnation(3, 4)), join(2, Incarnation(3, 6)))
    assert isinstance(said[0], Plan)
    assert said[0].incarnation == Incarnation(3, 7)


def test_rollbacks_that_any_rank_knows_hold_for_all() -> None:
    void = Held(piece=Piece(0), step=8, written=Incarnation(3, 1), size=5, layers=1)
    kept = void.model_copy(update={"step": 7})
    known = Lineage().rolled_back(Incarnation(3, 2), 7)
    _, said = planned(join(0, held=[void, kept]), join(1, lineage=known), join(2))
    assert isinstance(said[0], Plan)
    assert said[0].step == 7


def test_workers_start_when_all_have_applied_the_plan() -> None:
    mine, _ = planned()
    assert mine.applied(0, Applied(incarnation=FIRST)) == mine.applied(1, Applied(incarnation=FIRST)) == {}
    assert mine.applied(2, Applied(incarnation=Incarnation(3, 0))) == {}, "of another incarnation"
    assert mine.applied(2, Applied(incarnation=FIRST)) == dict.fromkeys(range(3), Start(incarnation=FIRST))
    assert mine.applied(2, Applied(incarnation=FIRST)) == {}


def broken(reason: str, own: bool, incarnation: Incarnation = FIRST) -> Broken:
    return Broken(incarnation=incarnation, reason=reason, message="why", own=own)


def test_the_first_that_breaks_ends_it_for_all_and_the_next_attempt_begins_with_new_joins() -> None:
    mine = started()
    abort = Abort(incarnation=FIRST, rank=1, reason="Signal: why", own=True)
    assert mine.broken(1, broken("Signal", True)) == dict.fromkeys(range(3), abort)
    assert mine.broken(0, broken("PeerLost", False)) == {}, "it is over already"
    assert mine.missing == [0, 1, 2]
    for rank in range(2):
        assert mine.join(join(rank, FIRST)) == {}
    said = mine.join(join(2, FIRST))
    assert isinstance(said[0], Plan)
    assert said[0].incarnation == Incarnation(3, 2)
    assert mine.broken(1, broken("Signal", True)) == {}, "a message of the attempt before"


def test_a_rank_that_only_lost_a_peer_is_not_blamed() -> None:
    mine = started()
    mine.broken(0, broken("PeerLost", False))
    mine.broken(2, broken("PeerLost", False))
    assert mine.first_cause == Failure(0, "PeerLost: why", False)
    mine.broken(1, broken("Signal", True))
    assert mine.first_cause == Failure(1, "Signal: why", True)


@pytest.mark.parametrize("applied", [0, 2, 3])
def test_the_loss_of_a_rank_ends_an_attempt_wherever_it_is(applied: int) -> None:
    mine, _ = planned()
    for rank in range(applied):
        mine.applied(rank, Applied(incarnation=FIRST))
    abort = Abort(incarnation=FIRST, rank=2, reason="silent", own=True)
    assert mine.gone(2, "silent") == dict.fromkeys(range(3), abort)


def test_a_rank_that_begins_anew_without_a_word_ends_the_attempt_for_the_others() -> None:
    mine = started()
    assert mine.join(join(1, FIRST)).keys() == {0, 2}
    assert mine.missing == [0, 2]


def test_those_that_leave_are_waited_for_until_a_member_needs_nothing_of_them() -> None:
    both = [join(0, size=1, leaving=1), join(1, size=1, leaving=1)]
    mine, said = planned(*both, size=1)
    assert said.keys() == {0, 1}
    plan = said[0]
    assert isinstance(plan, Plan)
    assert len(plan.addresses) == 2
    assert plan.guards == [None]
    assert mine.applied(0, Applied(incarnation=FIRST)) == {}
    assert mine.applied(1, Applied(incarnation=FIRST)).keys() == {0, 1}
    assert mine.gone(1, "deleted") == {}, "whoever still fetches from it will say so"
    assert mine.broken(0, broken("Signal", True)).keys() >= {0}
    assert mine.join(join(0, FIRST, size=1, leaving=1)) == {}
    assert mine.missing == [1]
    assert mine.join(join(0, FIRST, size=1)).keys() == {0}


def test_one_that_leaves_and_is_lost_before_the_start_ends_the_attempt() -> None:
    mine, _ = planned(join(0, size=1, leaving=1), join(1, size=1, leaving=1), size=1)
    assert mine.gone(1, "deleted").keys() >= {0}


def test_what_comes_to_a_rank_after_it_has_joined_counts() -> None:
    copy = Held(piece=Piece(0), step=7, written=Incarnation(2, 9), size=5, layers=1, copied=True)
    mine = coordinator()
    mine.holds(0, Holds(held=[copy]))  # not joined: nothing
    assert mine.join(join(0)) == mine.join(join(1)) == {}
    mine.holds(1, Holds(held=[copy]))
    plan = mine.join(join(2))[0]
    assert isinstance(plan, Plan)
    assert plan.holdings == [Holding(rank=1, held=copy)]


def test_who_leaves_is_released_when_all_hold_a_step_of_the_new_incarnation() -> None:
    mine, _ = planned(join(0, size=1, leaving=1), join(1, size=1, leaving=1), size=1)
    assert mine.settled(Settled(incarnation=NEVER)) == {}
    assert mine.settled(Settled(incarnation=FIRST)) == {1: Released()}
    assert mine.settled(Settled(incarnation=FIRST)) == {}
    assert mine.join(join(1, FIRST, size=1, leaving=1)) == {1: Released()}, "and tells it again to one that asks"


def test_a_member_that_needs_nothing_of_the_leaving_tells_the_next_coordinator() -> None:
    mine = coordinator(1)
    mine.join(join(0, FIRST, size=1))
    assert mine.join(join(1, FIRST, size=1, leaving=1)) == {1: Released()}


def test_the_job_is_done_when_every_rank_has_finished() -> None:
    mine = started()
    assert mine.finished(0, Finished(incarnation=FIRST)) == {}
    assert mine.finished(2, Finished(incarnation=NEVER)) == mine.finished(2, Finished(incarnation=FIRST)) == {}
    mine.broken(1, broken("Signal", True))
    for rank in range(3):
        mine.join(join(rank, FIRST))
    second = Incarnation(3, 2)
    said = [mine.finished(rank, Finished(incarnation=second)) for rank in range(3)]
    assert said == [{}, {}, dict.fromkeys(range(3), Done())], "what was finished before does not count"
    assert mine.gone(1, "closed") == mine.broken(0, broken("Signal", True, second)) == {}
    assert mine.join(join(1, second)) == {1: Done()}, "and tells it again to one that asks"


def test_the_newest_cut_of_the_shape_is_kept() -> None:
    def cut(end: int) -> Cut:
        return Cut(stages=3, pipelines=1, stage_of=(0, 1, 2), ends=(1, end, 9))

    _, said = planned(join(0), join(1, Incarnation(3, 4), cut=cut(5)), join(2, Incarnation(2, 9), cut=cut(6)))
    plan = said[0]
    assert isinstance(plan, Plan)
    assert plan.cut == cut(5)
    assert plan.cut.needs() == {0: [0], 1: [1, 2, 3, 4], 2: [5, 6, 7, 8]}
    _, said = planned()
    assert isinstance(said[0], Plan)
    assert said[0].cut is None


def test_copies_of_a_stage_need_the_same_layers_and_a_stage_those_of_all_its_chunks() -> None:
    cut = Cut(stages=2, pipelines=2, stage_of=(0, 1, 1, 0), ends=(1, 2, 4, 5))
    assert cut.needs() == {0: [0, 4], 1: [1, 2, 3], 2: [0, 4], 3: [1, 2, 3]}


def test_failures_that_ranks_tell_are_kept_once_and_within_bounds() -> None:
    def failure(rank: int, at: float) -> FailureRecord:
        return FailureRecord(rank=rank, at=at, reason="Signal")

    mine = coordinator()
    mine.join(join(1, failures=[failure(1, 5.0), failure(1, 9.0)]))
    mine.join(join(0, failures=[failure(0, 7.0)]))
    mine.join(join(1, failures=[failure(1, 9.0)]))
    assert [record.at for record in mine.records] == [5.0, 7.0, 9.0]
    for second in range(10, 10 + FAILURES_KEPT):
        mine.join(join(0, failures=[failure(0, float(second))]))
    assert [record.at for record in mine.records] == [float(second) for second in range(10, 10 + FAILURES_KEPT)]


def test_messages_travel_as_lines() -> None:
    sent: list[ToCoordinator] = [join(0), Applied(incarnation=FIRST), broken("Signal", True), Holds(held=[])]
    assert [TO_COORDINATOR.validate_json(to_line(message)) for message in sent] == sent
    _, said = planned()
    plan = said[0]
    assert isinstance(plan, Plan)
    assert TO_MEMBER.validate_json(to_line(plan)) == plan
    assert plan.step is None
