"""A model of the protocol: ranks that train, snapshot, copy and recover in steps so small that a kill fits between.

Decisions are those of the real code; memory, messages and time are the model's. The state after a step is a number that
depends on all steps before and on the incarnations that computed them: two histories never have the same.
"""

import random
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pipelinejob_worker.recovery.agreement import Holding, agree, assign
from pipelinejob_worker.recovery.pieces import NEVER, Held, Incarnation, Lineage, Piece
from pipelinejob_worker.recovery.placement import copy_holders
from pipelinejob_worker.recovery.protection import Protection, decide

Task = Generator[Callable[[], bool] | None, None, None]
"""Something that happens in small steps; it yields what it waits for, or None."""

Slot = tuple[Held, int] | None
"""What is held and its value; None is invalid."""


@dataclass
class Memory:
    """What outlives a worker: the slots of one agent, and what it has written down."""

    slots: dict[tuple[bool, Piece], list[Slot]] = field(default_factory=dict)
    lineage: Lineage = field(default_factory=Lineage)
    incarnation: Incarnation = NEVER

    def held(self) -> list[Held]:
        return [slot[0] for slots in self.slots.values() for slot in slots if slot]

    def begin(self, copied: bool, piece: Piece, step: int) -> tuple[list[Slot], int]:
        """Invalidate the slot that the next snapshot goes to, as ``SlotStore.begin`` does."""
        slots = self.slots.setdefault((copied, piece), [None, None])
        order = [((slot is not None and slot[0].step != step), slot[0].step if slot else -1) for slot in slots]
        chosen = order.index(min(order))
        slots[chosen] = None
        return slots, chosen

    def find(self, held: Held) -> Slot:
        return next((slot for slot in self.slots.get((held.copied, held.piece), []) if slot and slot[0] == held), None)

    def value(self, piece: Piece, step: int) -> int:
        return next(slot[1] for slot in self.slots[False, piece] if slot and slot[0].step == step)

    def invalidate(self, wrong: Callable[[Held], bool]) -> None:
        for slots in self.slots.values():
            for index, slot in enumerate(slots):
                if slot and wrong(slot[0]):
                    slots[index] = None


class World:
    """All ranks of a job, one incarnation after another."""

    def __init__(self, rng: random.Random, layers_of: Sequence[Sequence[int]], nodes: Sequence[str]) -> None:
        self.rng = rng
        self.ranks = range(len(layers_of))
        self.layers_of = layers_of
        self.layer_count = sum(map(len, layers_of))
        self.nodes = list(nodes)
        self.memories = [Memory() for _ in self.ranks]
        self.impatient = False
        """Whether votes may be cast before the guard has answered."""
        self.committed = 0
        """The newest step whose vote has ended for anyone."""
        self.begin_incarnation()

    # What a recovery does

    def inventories(self, lost: Collection[int] = ()) -> Mapping[int, Iterable[Held]]:
        return {rank: self.memories[rank].held() for rank in self.ranks if rank not in lost}

    def agreed(self, lost: Collection[int] = ()) -> tuple[int, list[Holding]] | None:
        """What recovery would find if these ranks and their memory were lost now."""
        lineage = Lineage().joined(self.memories[rank].lineage for rank in self.ranks if rank not in lost)
        return agree(self.inventories(lost), lineage)

    def begin_incarnation(self) -> None:
        """Stop all workers and transfers, and make the next plan."""
        self.lineage = Lineage().joined(memory.lineage for memory in self.memories)
        last = max(memory.incarnation for memory in self.memories)
        self.incarnation = Incarnation(1, last.attempt + 1)
        plan = agree(self.inventories(), self.lineage)
        self.step, holdings = plan or (0, [])
        self.lineage = self.lineage.rolled_back(self.incarnation, self.step)
        self.fetches = assign(holdings, dict(enumerate(self.layers_of))) if plan else {}
        self.guards = copy_holders(self.nodes)
        self.applied: set[int] = set()
        self.own_step: dict[int, int] = {}
        self.guarded_step: dict[int, int] = {}
        self.votes: dict[int, dict[int, tuple[bool, bool]]] = {}
        self.protections: dict[int, Protection] = {}
        self.committed = self.step
        self.tasks = [task for rank in self.ranks for task in (self._worker(rank), self._copier(rank))]
        self.waiting: dict[Task, Callable[[], bool] | None] = dict.fromkeys(self.tasks)

    def advance(self) -> None:
        """Let one task, drawn among those that can, take one small step."""
        ready = [task for task in self.tasks if (until := self.waiting[task]) is None or until()]
        task = self.rng.choice(ready)
        self.waiting[task] = next(task)

    def lose(self, ranks: Collection[int]) -> None:
        """The pods of these ranks, with their memory, are gone; new ones take their places."""
        for rank in ranks:
            self.memories[rank] = Memory()

    # What a rank does

    def _worker(self, rank: int) -> Task:
        memory, pieces = self.memories[rank], [Piece(layer) for layer in self.layers_of[rank]]
        yield None
        memory.incarnation, memory.lineage = self.incarnation, self.lineage
        memory.invalidate(lambda held: held.step > self.step or not self.lineage.counts(held))
        self.applied.add(rank)
        yield lambda: len(self.applied) == len(self.ranks)
        for fetch in self.fetches.get(rank, []):
            slots, index = memory.begin(False, fetch.held.piece, self.step)
            yield None
            source = self.memories[fetch.source].find(fetch.held)
            assert source, "what the plan names is still there"
            slots[index] = (fetch.held.model_copy(update={"copied": False}), source[1])
            yield None
        if self.step:
            values = {memory.value(piece, self.step) for piece in pieces}
            assert len(values) == 1, "pieces of one history"
            (value,) = values
            self.own_step[rank] = self.step
            protection = Protection(snapshot=self.step)
        else:
            value, protection = 0, Protection()
        step = self.step
        while True:
            self.protections[rank] = protection
            step += 1
            newest = protection.snapshot
            if protection.due(step) and newest is not None and not self.impatient:
                yield lambda newest=newest: self.guarded_step.get(rank) == newest
            yield None
            guarded = self.guarded_step.get(rank) == newest
            self.votes.setdefault(step, {})[rank] = (self.own_step.get(rank) != newest, not guarded)
            yield lambda step=step: len(self.votes[step]) == len(self.ranks)
            ballots = self.votes[step].values()
            protection, take = decide(protection, step, sum(b[0] for b in ballots), sum(b[1] for b in ballots))
            value = hash((value, step, self.incarnation))
            self.committed = max(self.committed, step)
            for piece in pieces if take else []:
                slots, index = memory.begin(False, piece, step)
                yield None
                held = Held(piece=piece, step=step, written=self.incarnation, size=1, layers=self.layer_count)
                slots[index] = (held, value)
                yield None
            if take:
                self.own_step[rank] = step

    def _copier(self, rank: int) -> Task:
        guard = self.guards[rank]
        while True:
            yield lambda: self.own_step.get(rank) != self.guarded_step.get(rank)
            step, stored = self.own_step[rank], True
            for layer in self.layers_of[rank] if guard is not None else []:
                stored &= yield from self._copy(rank, guard, Piece(layer), step)
            if stored:
                self.guarded_step[rank] = step  # the last answer has arrived

    def _copy(self, rank: int, guard: int, piece: Piece, step: int) -> Generator[None, None, bool]:
        def own() -> Slot:
            slots = self.memories[rank].slots[False, piece]
            return next((slot for slot in slots if slot and slot[0].step == step), None)

        source = own()
        if source is None:
            return False
        held = source[0].model_copy(update={"copied": True})
        if self.memories[guard].find(held):
            return True
        slots, index = self.memories[guard].begin(True, piece, step)
        yield None
        if own() != source:
            return False  # overwritten meanwhile: the checksum is wrong
        slots[index] = (held, source[1])
        yield None
        return True
