"""What an agent writes down for its successor in the same pod, beside the slots."""

from pathlib import Path

from pydantic import Field

from pipelinejob_worker.protocol import Termination
from pipelinejob_worker.protocol.base import Wire
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
    failure: Termination | None = Field(None, description="Why the worker or the agent ended last.")

    def crashed(self, crash: Crash, failure: Termination) -> "Memory":
        """Return the memory after a crash of the worker."""
        return self.model_copy(update={"crashes": (*self.crashes, crash)[-CRASHES_KEPT:], "failure": failure})


def load(directory: Path) -> Memory:
    """Return what was written down, or an empty memory. Raises ValueError when it cannot be read."""
    path = directory / _NAME
    return Memory.model_validate_json(path.read_bytes()) if path.exists() else Memory()


def save(directory: Path, memory: Memory) -> None:
    """Write it down; a reader sees all of it or what was there before. Raises OSError."""
    replace(directory / _NAME, memory.to_json().encode())
