"""What an agent writes down for its successor in the same pod, beside the slots."""

from pathlib import Path

from pydantic import Field

from pipelinejob_worker.protocol import FAILURES_KEPT, FailureRecord
from pipelinejob_worker.protocol.base import Wire
from pipelinejob_worker.recovery.cut import Cut
from pipelinejob_worker.recovery.deadlines import Crash
from pipelinejob_worker.recovery.pieces import NEVER, Incarnation, Lineage
from pipelinejob_worker.state.files import replace

CRASHES_KEPT = 64
_NAME = "memory.json"


class Memory(Wire):
    """All that must outlive the agent but the slots."""

    incarnation: Incarnation = Field(NEVER, description="The newest whose plan was applied.")
    lineage: Lineage = Lineage()
    crashes: tuple[Crash, ...] = Field((), description="Of the worker, the newest last.")
    failures: tuple[FailureRecord, ...] = Field((), description="Of worker and agent, the newest last.")
    workers: int = Field(0, description="Workers that were started.")
    cut: Cut | None = Field(None, description="Of the newest incarnation that had one.")
    agent_runs: bool = Field(False, description="Set while an agent runs: its successor sees that it was killed.")
    done: bool = Field(False, description="Whether all ranks have finished.")

    def failed(self, failure: FailureRecord, crash: Crash | None) -> "Memory":
        """Return the memory after a failure; ``crash``: if it counts against the budget."""
        return self.model_copy(
            update={
                "failures": (*self.failures, failure)[-FAILURES_KEPT:],
                "crashes": (*self.crashes, crash)[-CRASHES_KEPT:] if crash else self.crashes,
            }
        )


def load(directory: Path) -> Memory:
    """Return what was written down, or an empty memory. Raises ValueError when it cannot be read."""
    path = directory / _NAME
    return Memory.model_validate_json(path.read_bytes()) if path.exists() else Memory()


def save(directory: Path, memory: Memory) -> None:
    """Write it down; a reader sees all of it or what was there before. Raises OSError."""
    replace(directory / _NAME, memory.to_json().encode())
