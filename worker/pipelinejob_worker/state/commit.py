"""How the ranks agree on a checkpoint: all wrote it, or it does not count; all can read it, or none does.

Agreement on a save rides on the vote that the ranks sum at every step, so the threads that write never communicate.
Each rank has one element of the vote, zero on all other ranks, hence exact in the sum. It holds ``PENDING``, ``DONE``
or, when the volume failed, the error number below zero. When all ranks have written, rank 0 publishes; when it is done
with that, so is the checkpoint. Each rank draws the same conclusion from the same sum, at the same step.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto

import structlog
import torch

from pipelinejob_worker.protocol import Membership
from pipelinejob_worker.state.checkpoint import CheckpointDamagedError, CheckpointStore

log = structlog.get_logger()

Sum = Callable[[torch.Tensor], torch.Tensor]
"""Collective: the element-wise sum over all ranks."""

PENDING, DONE = 0.0, 1.0

_CAUSE_LIMIT_BYTES = 300
_FAILURES_NAMED = 3  # both, because a problem is part of a status


class Phase(Enum):
    """What is happening to the checkpoint in flight."""

    IDLE = auto()
    WRITING = auto()  # each rank writes its layers
    PUBLISHING = auto()  # rank 0 completes it
    DISCARDING = auto()  # rank 0 deletes it, so that a full volume is not kept full by what does not count


@dataclass(frozen=True)
class Agreement:
    """What all ranks know about checkpoints, always the same; a pure value.

    ``problem`` says why the newest checkpoint was not written or not used; empty after a success.
    """

    stages: int
    pipelines: int
    saved_step: int = 0
    problem: str = ""
    phase: Phase = Phase.IDLE
    step: int = 0

    def begin(self, step: int) -> "Agreement":
        """All ranks start to write the checkpoint of ``step``; none may be in flight."""
        assert self.phase is Phase.IDLE, f"the checkpoint of step {self.step} is in flight"
        return replace(self, phase=Phase.WRITING, step=step)

    def after(self, total: Sequence[float]) -> "Agreement":
        """Conclude from the sum of the votes, one element for each rank."""
        match self.phase:
            case Phase.WRITING if PENDING not in total:
                if all(code == DONE for code in total):
                    return replace(self, phase=Phase.PUBLISHING)
                return replace(self, phase=Phase.DISCARDING, problem=self._problem("written", total))
            case Phase.PUBLISHING if total[0] == DONE:
                return replace(self, phase=Phase.IDLE, saved_step=self.step, problem="")
            case Phase.PUBLISHING if total[0] != PENDING:
                return replace(self, phase=Phase.IDLE, problem=self._problem("completed", total))
            case Phase.DISCARDING if total[0] != PENDING:
                return replace(self, phase=Phase.IDLE)
        return self

    def _problem(self, what: str, total: Sequence[float]) -> str:
        failed = [(rank, code) for rank, code in enumerate(total) if code < 0]
        causes = [f"{self._place(rank)}: {os.strerror(int(-code))}" for rank, code in failed[:_FAILURES_NAMED]]
        if len(failed) > len(causes):
            causes.append(f"and {len(failed) - len(causes)} more")
        newest = f"the newest is of step {self.saved_step}" if self.saved_step else "there is none yet"
        return f"the checkpoint of step {self.step} was not {what}: {'; '.join(causes)}; {newest}"

    def _place(self, rank: int) -> str:
        return place(rank, self.stages, self.pipelines)


def place(rank: int, stages: int, pipelines: int) -> str:
    """Return what a user calls ``rank``."""
    return f"stage {rank % stages}" + (f" of pipeline {rank // stages}" if pipelines > 1 else "")


@dataclass(frozen=True)
class Resumed:
    """The state to go on from; step 0 without layers means that there is no checkpoint.

    ``layers`` by global index, ``extra`` as it was saved, ``problem``: why a newer checkpoint is not used.
    """

    step: int = 0
    layers: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    extra: dict[str, int | float] = field(default_factory=dict)
    problem: str = ""


def resume(
    store: CheckpointStore,
    membership: Membership,
    total: Sum,
    names: Sequence[str],
    shapes: Mapping[int, Mapping[str, tuple[int, ...]]],
) -> Resumed:
    """Find the newest checkpoint that every rank can read; return this rank's layers; collective.

    ``shapes`` are the tensors that each of this rank's layers must have. When one rank finds damage, all take the
    checkpoint before and know why. Raises ConfigurationError when a checkpoint is of another model, seed or
    optimizer.
    """
    found, problem = Resumed(), ""
    while newest := max(_gather(next(iter(store.complete_steps()), 0), membership, total)):
        read = _read(store, newest, names, shapes)
        cause = _first_text(read if isinstance(read, str) else "", membership, total)
        if isinstance(read, Resumed) and not cause:
            found = read
            break
        log.warning("checkpoint is damaged; the one before is taken", step=newest, error=cause)
        problem = problem or f"the checkpoint of step {newest} was not used: {cause}"
        store.distrust(newest)
    if membership.rank == 0:
        _discard_unfinished(store)
    return replace(found, problem=f"{problem}; training went on from step {found.step}" if problem else "")


def resume_beside(store: CheckpointStore, membership: Membership, total: Sum) -> Resumed:
    """Return what there is of checkpoints where the state comes from elsewhere; collective."""
    newest = max(_gather(next(iter(store.complete_steps()), 0), membership, total))
    if membership.rank == 0:
        _discard_unfinished(store)
    return Resumed(step=newest)


def _discard_unfinished(store: CheckpointStore) -> None:
    """Delete what no rank writes any more: none does before all, rank 0 too, have made a step."""
    try:
        store.discard_unfinished()
    except OSError as error:
        log.warning("unfinished checkpoints not deleted", error=str(error))


def _read(
    store: CheckpointStore,
    step: int,
    names: Sequence[str],
    shapes: Mapping[int, Mapping[str, tuple[int, ...]]],
) -> Resumed | str:
    """Return what this rank has read, or why it cannot."""
    try:
        manifest = store.manifest(step)
        layers = {index: store.read_layer(manifest, names[index], shapes[index]) for index in shapes}
        return Resumed(step, layers, manifest.extra)
    except CheckpointDamagedError as error:
        return str(error)


def _gather(value: int, membership: Membership, total: Sum) -> list[int]:
    """Return every rank's ``value``."""
    values = torch.zeros(membership.world_size, dtype=torch.int64)
    values[membership.rank] = value
    gathered: list[int] = total(values).tolist()
    return gathered


def _first_text(text: str, membership: Membership, total: Sum) -> str:
    """Return the first rank's ``text`` that is not empty, with the place it is from, or an empty one."""
    content = text.encode()[:_CAUSE_LIMIT_BYTES]
    sizes = _gather(len(content), membership, total)
    author = next((rank for rank, size in enumerate(sizes) if size), None)
    if author is None:
        return ""
    letters = torch.zeros(sizes[author], dtype=torch.uint8)
    if membership.rank == author:
        letters = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    shared = bytes(total(letters).tolist()).decode(errors="replace")
    return f"{place(author, membership.stages, membership.pipelines)}: {shared}"
