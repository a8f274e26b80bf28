"""Token ids on disk, as one long stream that is read in windows."""

import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelinejob_worker.data.refusal import refusal

Ids = NDArray[np.int64]


class TokenFile(NamedTuple):
    """Token ids as they lie in a file, one after another, in any integer type."""

    path: str
    dtype: np.dtype[np.integer]
    tokens: int
    offset: int = 0
    """Bytes before the first token."""


class TokenStream:
    """Files with token ids below ``vocabulary``, one after another.

    Windows are read when they are needed, so memory holds names and sizes only. Reading, unlike mapping into memory,
    turns a file that someone cuts short into an error: a mapped one would kill the process.
    """

    def __init__(self, files: Sequence[TokenFile], vocabulary: int) -> None:
        self._files = files
        self._ends = list(accumulate(file.tokens for file in files))
        self._vocabulary = vocabulary
        self.tokens = self._ends[-1] if files else 0

    def read(self, first: int, count: int) -> Ids:
        """Return ``count`` ids from ``first`` on; both must be inside the stream.

        Raises ConfigurationError when a file has become shorter or an id is not one of the model's, OSError when a
        file cannot be read any more.
        """
        parts: list[Ids] = []
        place = bisect_right(self._ends, first)
        while count > 0:
            wanted = min(count, self._ends[place] - first)
            file = self._files[place]
            parts.append(self._read_file(file, first - (self._ends[place] - file.tokens), wanted))
            first, count, place = first + wanted, count - wanted, place + 1
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _read_file(self, file: TokenFile, first: int, count: int) -> Ids:
        size = file.dtype.itemsize
        with Path(file.path).open("rb") as opened:
            opened.seek(file.offset + first * size, os.SEEK_SET)
            data = opened.read(count * size)
        if len(data) < count * size:
            raise refusal(
                "files",
                f"{file.path} has become shorter while it was read",
                "files that do not change during training",
                "restore it or train on a copy",
            )
        ids = np.frombuffer(data, file.dtype)
        wrong = np.flatnonzero((ids < 0) | (ids >= self._vocabulary))
        if wrong.size:
            raise refusal(
                "files",
                f"{file.path} has token id {ids[wrong[0]]} at index {first + wrong[0]}",
                f"0 to {self._vocabulary - 1}, the ids that the model knows",
                "use the tokens of the model's own tokenizer",
            )
        return ids.astype(np.int64)
