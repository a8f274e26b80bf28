"""Finding the files of spec.train.data.files."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from pipelinejob_worker.data.refusal import refusal, unreadable
from pipelinejob_worker.protocol.train import Data


def find(data: Data) -> list[str]:
    """Return what the patterns match, each path once, sorted: directories for format Dataset, else files.

    Raises ConfigurationError if nothing matches.
    """
    wanted = Path.is_dir if data.format == "Dataset" else Path.is_file
    # Path.glob takes no absolute patterns.
    found = {path for pattern in data.files for path in glob.iglob(pattern, recursive=True)}  # noqa: PTH207
    paths = sorted(path for path in found if wanted(Path(path)))
    if not paths:
        kind = "directory" if data.format == "Dataset" else "file"
        raise refusal(
            "files",
            f"no {kind} matches {', '.join(data.files)}",
            f"at least one {kind} in the worker container",
            "correct the pattern or mount the data",
        )
    return paths


def sizes_of(paths: Sequence[str]) -> list[int]:
    """Return each file's size in bytes. Raises ConfigurationError for a file that cannot be opened."""
    return [_size_of(path) for path in paths]


def _size_of(path: str) -> int:
    try:
        with Path(path).open("rb") as file:
            return file.seek(0, os.SEEK_END)
    except OSError as error:
        raise unreadable(path, error) from error
