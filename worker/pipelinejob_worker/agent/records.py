"""What an agent writes down about failures, for itself, its successor and the operator; and what follows from them."""

import signal
import time
from collections import deque
from pathlib import Path

import structlog

from pipelinejob_worker.agent.ending import Ending
from pipelinejob_worker.protocol import (
    FAILURE_TAIL_LINES,
    FAILURE_TEXT_CHARACTERS,
    ExitCode,
    FailureRecord,
    Recovery,
)
from pipelinejob_worker.recovery.deadlines import Crash, GiveUp, after_crash
from pipelinejob_worker.recovery.keeper import Keeper
from pipelinejob_worker.recovery.pieces import Incarnation

log = structlog.get_logger()

_EVENTS = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control")


class Records:
    """The failures of one pod. They are kept beside the slots, and so outlive the container."""

    def __init__(self, keeper: Keeper, recovery: Recovery, node: str, tail: deque[str]) -> None:
        self._keeper = keeper
        self._recovery = recovery
        self._node = node
        self._tail = tail
        self.not_before = 0.0
        """Monotonic time before which no worker is started."""

    @property
    def failures(self) -> tuple[FailureRecord, ...]:
        """All that are known, the newest last."""
        return self._keeper.memory.failures

    @property
    def restarts(self) -> int:
        """Workers that were started in place of one that had ended."""
        return max(0, self._keeper.memory.workers - 1)

    def begin(self, rank: int) -> Ending | None:
        """An agent begins: note how the one before has ended, if it could not say so."""
        memory = self._keeper.memory
        self._keeper.remember(memory.model_copy(update={"agent_runs": True}))
        if not memory.agent_runs:
            return None
        step = max((held.step for held in self._keeper.store.held()), default=0)
        message = "the container ended, and its agent could not say why; a kill for want of memory looks like this"
        return self.note(Ending(128 + signal.SIGKILL, "ContainerLost", message), rank, step, memory.incarnation)

    def end(self) -> None:
        """The agent ends in order."""
        self._keeper.remember(self._keeper.memory.model_copy(update={"agent_runs": False}))

    def started(self) -> None:
        """A worker starts."""
        memory = self._keeper.memory
        self._keeper.remember(memory.model_copy(update={"workers": memory.workers + 1}))

    def note(self, ended: Ending, rank: int, step: int, incarnation: Incarnation) -> Ending | None:
        """Note a failure of this rank's own; return how the agent has to end if it was one too many."""
        number = ended.code - 128
        failure = FailureRecord(
            rank=rank,
            at=time.time(),
            exit_code=ended.code,
            signal=signal.Signals(number).name if number in set(signal.Signals) else "",
            reason=ended.reason,
            message=ended.message[:FAILURE_TEXT_CHARACTERS],
            step=step,
            node=self._node,
            epoch=incarnation.epoch,
            attempt=incarnation.attempt,
            log_tail=tuple(list(self._tail)[-FAILURE_TAIL_LINES:]),
        )
        now = time.monotonic()
        self._keeper.remember(self._keeper.memory.failed(failure, Crash(at=now, step=step)))
        log.warning("failure", reason=ended.reason, message=ended.message, code=ended.code, step=step)
        verdict = after_crash(
            self._keeper.memory.crashes,
            now,
            budget=self._recovery.max_restarts,
            window=self._recovery.window_seconds,
        )
        if isinstance(verdict, GiveUp):
            return Ending(ExitCode.BUDGET_SPENT, "BudgetSpent", f"{verdict.reason}; the last time: {ended.message}")
        self.not_before = now + verdict.delay
        return None


def oom_kills() -> int:
    """Return how many processes of this container the kernel has killed for want of memory."""
    for path in _EVENTS:
        try:
            lines = Path(path).read_text().splitlines()
        except OSError:
            continue
        counts = dict(line.split()[:2] for line in lines if len(line.split()) > 1)
        return int(counts.get("oom_kill", 0))
    return 0
