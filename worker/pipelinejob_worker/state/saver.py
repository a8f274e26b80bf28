"""Saving checkpoints while training goes on."""

import errno
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import structlog
import torch

from pipelinejob_worker.protocol import Membership
from pipelinejob_worker.state.checkpoint import CheckpointDamagedError, CheckpointStore, Written, global_names
from pipelinejob_worker.state.commit import DONE, PENDING, Agreement, Phase, Resumed, Sum
from pipelinejob_worker.state.layout import Tensors
from pipelinejob_worker.state.snapshot import Snapshot

log = structlog.get_logger()

POLL_SECONDS = 10.0
"""How often ranks that wait for the volume exchange a vote: a slow volume must not look like a lost peer."""


class AsyncSaver:
    """Saves checkpoints of one rank's layers, in step with the savers of all other ranks.

    At every step all ranks put ``vote`` into the vector that they sum and give the sum to ``advance``. ``begin`` comes
    after the update of the weights, on all ranks at the same step. None of these waits for the volume.
    """

    def __init__(
        self, store: CheckpointStore, membership: Membership, names: Sequence[str], keep: int, resumed: Resumed
    ) -> None:
        """``names``: all layers of the model; ``keep``: how many checkpoints to keep."""
        self._store = store
        self._membership = membership
        self._names = names
        self._keep = keep
        self._agreement = Agreement(
            membership.stages, membership.pipelines, saved_step=resumed.step, problem=resumed.problem
        )
        self._snapshot = Snapshot()
        self._task: _Task | None = None
        self._extra: Mapping[str, int | float] = {}
        self._started = 0.0
        self.skipped = 0

    @property
    def saved_step(self) -> int:
        """Step of the newest complete checkpoint; the same on all ranks."""
        return self._agreement.saved_step

    @property
    def problem(self) -> str:
        """Why the newest checkpoint was not written or not used, empty after a success; the same on all ranks."""
        return self._agreement.problem

    @property
    def in_flight(self) -> bool:
        """Whether a checkpoint is being saved; the same on all ranks."""
        return self._agreement.phase is not Phase.IDLE

    def begin(
        self,
        step: int,
        layers: Mapping[str, Tensors],
        extra: Mapping[str, int | float],
        *,
        first: Callable[[], None] | None = None,
    ) -> None:
        """Start to save the state after ``step`` steps; skip it if another checkpoint is in flight.

        ``layers``: this rank's share of each of its layers, by global name; they are copied before this returns (on
        CUDA: before later work of the current stream). ``extra``: the same on all ranks. ``first`` runs in the
        background before anything is written; its OSError counts as a failed write.
        """
        if self.in_flight:
            self.skipped += 1
            if self._membership.rank == 0:
                log.warning("checkpoint skipped: the one before is still being written", step=step)
            return
        self._agreement = self._agreement.begin(step)
        self._started = time.monotonic()
        self._extra = dict(extra)
        self._snapshot.take({name: global_names(name, tensors) for name, tensors in layers.items()})
        self._task = _Task(lambda: self._write(step, first))

    def vote(self) -> list[float]:
        """Return this rank's contribution to the next sum, one element for each rank.

        Raises what went wrong in the background, unless it is the volume's failure.
        """
        vote = [PENDING] * self._membership.world_size
        if self._task:
            vote[self._membership.rank] = self._task.outcome()
        return vote

    def advance(self, total: Sequence[float]) -> None:
        """Conclude from the sum of all ranks' votes."""
        before, self._agreement = self._agreement, self._agreement.after(total)
        if self._agreement.phase is before.phase:
            return
        self._task = None
        if self._membership.rank != 0:
            return
        match self._agreement.phase:
            case Phase.PUBLISHING:
                self._task = _Task(lambda: self._publish(before.step))
            case Phase.DISCARDING:
                self._task = _Task(self._store.discard_unfinished)
            case Phase.IDLE if self.problem:
                log.warning("checkpoint not saved", step=before.step, error=self.problem)
            case Phase.IDLE:
                log.info("checkpoint saved", step=before.step, seconds=round(time.monotonic() - self._started, 3))

    def finish(self, total: Sum) -> None:
        """Wait until no checkpoint is in flight; collective."""
        while self.in_flight:
            if self._task:
                self._task.wait(POLL_SECONDS)
            self.advance(total(torch.tensor(self.vote(), dtype=torch.float64)).tolist())

    def _write(self, step: int, first: Callable[[], None] | None) -> None:
        part, parts = self._membership.pipeline, self._membership.pipelines
        self._snapshot.wait()
        if first:
            first()
        files = {
            name: self._store.write_layer(step, name, content, part=part, parts=parts)
            for name, content in self._snapshot.files()
        }
        self._store.write_list(step, self._membership.rank, Written(part=part, layers=files))

    def _publish(self, step: int) -> None:
        try:
            self._store.publish(
                step,
                self._names,
                ranks=self._membership.world_size,
                parts=self._membership.pipelines,
                extra=self._extra,
            )
        except (OSError, CheckpointDamagedError):
            _attempt("unfinished checkpoint not deleted", self._store.discard_unfinished)
            raise
        _attempt("old checkpoints not deleted", self._store.retain, self._keep)


def _attempt(failure: str, clean_up: Callable[..., None], *arguments: object) -> None:
    """Clean up; a volume that fails at that costs space, not the checkpoint."""
    try:
        clean_up(*arguments)
    except OSError as error:
        log.warning(failure, error=str(error))


class _Task:
    """Work on the volume in a thread of its own, which no exit of the process waits for."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._outcome = PENDING
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def outcome(self) -> float:
        """Return what to vote; raise what is not the volume's failure."""
        if self._error:
            raise self._error
        return self._outcome

    def wait(self, seconds: float) -> None:
        """Wait until the work is done, but not longer than ``seconds``."""
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            self._work()
            self._outcome = DONE
        except (OSError, CheckpointDamagedError) as error:
            self._outcome = -float((isinstance(error, OSError) and error.errno) or errno.EIO)
            log.warning("the checkpoint volume failed", error=str(error))  # may fail itself, hence last
        except Exception as error:  # noqa: BLE001 - the thread that trains raises it
            self._error = error
