"""The agent of rank 0 as coordinator: who is there, which attempt, who broke it. Pure: messages in, messages out.

It keeps nothing that its successor would miss: every attempt begins with what all ranks tell.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pipelinejob_worker.protocol import FAILURES_KEPT, FailureRecord
from pipelinejob_worker.recovery.agreement import agree
from pipelinejob_worker.recovery.cut import Cut
from pipelinejob_worker.recovery.messages import (
    Abort,
    Applied,
    Broken,
    Done,
    Finished,
    Holds,
    Join,
    Plan,
    Refused,
    Released,
    Settled,
    Start,
)
from pipelinejob_worker.recovery.pieces import Incarnation, Lineage
from pipelinejob_worker.recovery.placement import copy_holders

Outgoing = Mapping[int, Plan | Start | Abort | Released | Done]
"""Messages by rank."""


@dataclass(frozen=True)
class Failure:
    """What ended a rank's part of an incarnation; ``own``: by its own fault."""

    rank: int
    reason: str
    own: bool


class Coordinator:
    """One epoch of a job.

    Gathering: waits until all ranks have joined. Planned: waits until all have applied the plan. Started: waits for
    the first that breaks. That, and the loss of a rank, leads back to gathering, where all join anew.
    """

    def __init__(self, job_uid: str, epoch: int, world_size: int, listen: Callable[[Incarnation], int]) -> None:
        """``listen``: has rank 0 listen for the process group of an incarnation, and returns the port."""
        self._job_uid = job_uid
        self._epoch = epoch
        self._world_size = world_size
        self._listen = listen
        self._joins: dict[int, Join] = {}
        self._planned: Incarnation | None = None
        self._participants = world_size
        """Ranks of the planned incarnation, those that only give what they hold included."""

        self._applied: set[int] = set()
        self._newest = Incarnation(epoch, 0)
        self.started = False
        self.failures: list[Failure] = []
        """Of the newest incarnation, in the order in which they were told."""

        self._records: dict[tuple[int, float], FailureRecord] = {}
        self._settled = False
        """Whether nothing is needed of those that leave."""

        self._finished: set[int] = set()
        self.done = False

    @property
    def records(self) -> list[FailureRecord]:
        """The newest failures that the ranks have told, in the order of their times."""
        return sorted(self._records.values(), key=lambda record: record.at)[-FAILURES_KEPT:]

    @property
    def missing(self) -> list[int]:
        """Ranks that have not joined the attempt that is being gathered."""
        return [] if self._planned else [rank for rank in range(self._expected()) if rank not in self._joins]

    @property
    def first_cause(self) -> Failure | None:
        """The first failure of a rank's own, else the first: who only lost a peer is not to blame."""
        return next((failure for failure in self.failures if failure.own), None) or next(iter(self.failures), None)

    def refusal(self, join: Join) -> Refused | None:
        """Return why this rank cannot join."""
        if join.job_uid != self._job_uid:
            return Refused(reason=f"job {join.job_uid} is not job {self._job_uid}")
        if join.epoch != self._epoch:
            return Refused(reason=f"epoch {join.epoch} is not {self._epoch}")
        if join.world_size != self._world_size or not self._world_size <= join.present or join.rank >= join.present:
            return Refused(
                reason=f"rank {join.rank} of {join.world_size}, {join.present} present, is none of {self._world_size}"
            )
        return None

    def join(self, join: Join) -> Outgoing:
        """A rank has joined, which ``refusal`` allows; a rank that had joined before has begun anew."""
        self._records |= {(record.rank, record.at): record for record in join.failures}
        self._records = {(record.rank, record.at): record for record in self.records}
        if self.done:
            return {join.rank: Done()}
        if join.rank < self._world_size and join.present == self._world_size:
            self._settled = True
        if join.rank >= self._world_size and self._settled:
            return {join.rank: Released()}
        outgoing = self._break(Failure(join.rank, "it has begun anew", own=True)) if self._planned else {}
        self._joins[join.rank] = join
        if not self.missing:
            return self._plan()
        return {rank: message for rank, message in outgoing.items() if rank != join.rank}

    def holds(self, rank: int, message: Holds) -> None:
        """A rank that has joined holds something else by now; once a plan is made that does not matter."""
        if rank in self._joins:
            self._joins[rank] = self._joins[rank].model_copy(update={"held": message.held})

    def applied(self, rank: int, message: Applied) -> Outgoing:
        """A rank has applied the plan."""
        if message.incarnation != self._planned or self.started:
            return {}
        self._applied.add(rank)
        if len(self._applied) < self._participants:
            return {}
        self.started = True
        return dict.fromkeys(range(self._participants), Start(incarnation=self._planned))

    def broken(self, rank: int, message: Broken) -> Outgoing:
        """A rank's part of an incarnation has ended; it will join again."""
        if self.done or message.incarnation != self._newest:
            return {}
        failure = Failure(rank, f"{message.reason}: {message.message}"[:1024], message.own)
        if message.incarnation != self._planned:
            self.failures.append(failure)  # a further one, of the attempt that is over already
            return {}
        return self._break(failure)

    def settled(self, message: Settled) -> Outgoing:
        """Every rank holds a step of this incarnation: those that leave may go."""
        if message.incarnation != self._planned or self._settled:
            return {}
        self._settled = True
        return dict.fromkeys(range(self._world_size, self._participants), Released())

    def finished(self, rank: int, message: Finished) -> Outgoing:
        """A rank has done the last step. When all have, the job is done; until then one may have to do it again."""
        if message.incarnation != self._planned or rank >= self._world_size:
            return {}
        self._finished.add(rank)
        if len(self._finished) < self._world_size:
            return {}
        self.done = True
        return dict.fromkeys(range(self._participants), Done())

    def gone(self, rank: int, reason: str) -> Outgoing:
        """The connection to a rank that had joined has ended."""
        self._joins.pop(rank, None)
        if self.done:
            return {}
        needed = self._world_size if self.started else self._participants
        if self._planned and rank < needed:
            return self._break(Failure(rank, reason, own=True))
        return {}

    def _expected(self) -> int:
        """How many ranks to wait for: those that leave too, unless a member needs nothing of them any more."""
        present = [join.present for join in self._joins.values() if join.rank < self._world_size]
        return min(present, default=self._world_size)

    def _plan(self) -> Outgoing:
        self._participants = self._expected()
        joins = [self._joins[rank] for rank in range(self._participants)]
        lineage = Lineage().joined(join.lineage for join in joins)
        seen = [join.last.attempt for join in joins if join.last.epoch == self._epoch]
        incarnation = Incarnation(self._epoch, 1 + max([self._newest.attempt, *seen]))
        agreed = agree({join.rank: join.held for join in joins}, lineage)
        step, holdings = agreed or (None, [])
        plan = Plan(
            incarnation=incarnation,
            step=step,
            lineage=lineage.rolled_back(incarnation, step or 0),
            holdings=holdings,
            addresses=[join.address for join in joins],
            guards=copy_holders([join.node for join in joins[: self._world_size]]),
            rendezvous_port=self._listen(incarnation),
            cut=_newest_cut(joins),
        )
        self._joins.clear()
        self._planned = self._newest = incarnation
        self._applied.clear()
        self._finished.clear()
        self.started = False
        self.failures = []
        return dict.fromkeys(range(self._participants), plan)

    def _break(self, failure: Failure) -> Outgoing:
        """End the planned incarnation: all are to leave it, also who broke it."""
        assert self._planned
        abort = Abort(incarnation=self._planned, rank=failure.rank, reason=failure.reason, own=failure.own)
        self.failures.append(failure)
        self._planned = None
        self.started = False
        return dict.fromkeys(range(self._participants), abort)


def _newest_cut(joins: Sequence[Join]) -> Cut | None:
    """The cut of the rank that was in the newest incarnation; all ranks of one have the same."""
    return max((join for join in joins if join.cut), key=lambda join: join.last, default=joins[0]).cut
