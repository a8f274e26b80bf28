"""The files of spec.train.data.files, and what tells that one has changed."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pipelinejob_worker.data.refusal import refusal, unreadable
from pipelinejob_worker.protocol.train import Data


class Stamp(NamedTuple):
    """A file as it is now: another size or time means another content."""

    path: str
    size: int
    """Bytes."""
    modified: int
    """Nanoseconds since 1970."""


def find(data: Data) -> list[str]:
    """Return what the patterns match, each path once, sorted: directories for format Dataset, else files.

    Raises ConfigurationError if nothing matches.
    """
    kind = "directory" if data.format == "Dataset" else "file"
    # Path.glob takes no absolute patterns.
    found = {path for pattern in data.files for path in glob.iglob(pattern, recursive=True)}  # noqa: PTH207
    paths = sorted(path for path in found if _is(kind, path))
    if not paths:
        raise refusal(
            "files",
            f"no {kind} matches {', '.join(data.files)}",
            f"at least one {kind} in the worker container",
            "correct the pattern or mount the data",
        )
    return paths


def stamps_of(paths: Sequence[str]) -> list[Stamp]:
    """Return each file's stamp. Raises ConfigurationError for a file that cannot be opened."""
    return [_stamp_of(path) for path in paths]


def _is(kind: str, path: str) -> bool:
    try:
        return Path(path).is_dir() if kind == "directory" else Path(path).is_file()
    except OSError as error:
        raise unreadable(path, error) from error


def _stamp_of(path: str) -> Stamp:
    try:
        with Path(path).open("rb") as file:
            found = os.fstat(file.fileno())
    except OSError as error:
        raise unreadable(path, error) from error
    return Stamp(path, found.st_size, found.st_mtime_ns)
