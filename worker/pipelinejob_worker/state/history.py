"""The loss of every finished step, one JSON line each, beside the checkpoints."""

import errno
import json
import os
from pathlib import Path

from pipelinejob_worker.state.files import replace

HISTORY = "history.jsonl"


class History:
    """The file ``history.jsonl``; the last stage writes it."""

    def __init__(self, directory: Path, resumed_step: int) -> None:
        """Open the file; drop what was written after the step that training resumes from. Raises OSError."""
        path = directory / HISTORY
        lines = path.read_bytes().splitlines() if path.exists() else []
        kept = [line for line in lines if _step_of(line) <= resumed_step]
        replace(path, b"".join(line + b"\n" for line in kept))
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        self._size = os.fstat(self._descriptor).st_size

    def append(self, step: int, loss: float) -> None:
        """Add one line; the loss has all its digits. Raises OSError and then leaves no half line."""
        line = json.dumps({"step": step, "loss": loss}).encode() + b"\n"
        if os.write(self._descriptor, line) < len(line):
            os.ftruncate(self._descriptor, self._size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), HISTORY)
        self._size += len(line)

    def sync(self) -> None:
        """Wait until all lines are on the volume; any thread may call this. Raises OSError."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def _step_of(line: bytes) -> float:
    """Step of a line; of a line that a crash has cut short, one that is never kept."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
