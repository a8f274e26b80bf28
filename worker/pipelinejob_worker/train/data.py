"""Training text as samples whose order is a pure function of the seed and the step."""

import glob
import hashlib
import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.models.randomness import mix
from pipelinejob_worker.protocol import Train

_ROUNDS = 4


def permuted(position: int, size: int, seed: int, epoch: int) -> int:
    """Return where ``position`` of ``[0, size)`` goes in the epoch's order: a bijection that needs no memory.

    A Feistel network (Luby and Rackoff 1988) over the next power of four, walked until it lands inside (Black
    and Rogaway 2002, "Ciphers with Arbitrary Finite Domains"). Unlike a library's shuffle it cannot change
    with a version.
    """
    half = (max(size - 1, 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (mix(seed, epoch, number, right) & mask)
        position = left << half | right
        if position < size:
            return position


class Corpus:
    """Files as one long text, in the order of their sorted paths, cut into windows of ``context + 1`` bytes.

    Only paths and sizes are held in memory; windows are read when they are needed.
    """

    def __init__(self, train: Train, context: int) -> None:
        """Find the files. Raises ConfigurationError when there is none or too little text for one step."""
        patterns = train.data.files
        self._window = context + 1
        self._seed = train.seed
        self._batch = train.global_batch_size
        self._paths = _files(patterns)
        if not self._paths:
            raise ConfigurationError(
                f"spec.train.data.files: no file matches {', '.join(patterns)}; allowed: at least one file "
                "in the worker container; correct the pattern or mount the data"
            )
        sizes = [_readable_size(path) for path in self._paths]
        self._ends = list(accumulate(sizes))
        self.windows = self._ends[-1] // self._window
        if self.windows < self._batch:
            raise ConfigurationError(
                f"spec.train.data.files: {self._ends[-1]} bytes in {len(sizes)} files make {self.windows} "
                f"samples of context {context}; allowed: at least globalBatchSize {self._batch}; add text or "
                "lower one of the two"
            )
        listing = "\n".join(f"{path} {size}" for path, size in zip(self._paths, sizes, strict=True))
        self.fingerprint = int.from_bytes(hashlib.sha256(listing.encode(errors="surrogateescape")).digest()[:7], "big")
        """Of all paths and sizes, below 2**56: two stages that see other files have another one."""

    def samples(self, step: int, first: int, count: int) -> torch.Tensor:
        """Return samples ``first`` to ``first + count`` of a step's batch: int64 ``[count, context + 1]``.

        ``step`` counts from 0. An epoch has each window once; the next one has another order.
        Raises ConfigurationError when a file has become shorter, OSError when it cannot be read any more.
        """
        windows = [self._sample(step * self._batch + first + index) for index in range(count)]
        return torch.from_numpy(np.stack([np.frombuffer(window, dtype=np.uint8) for window in windows])).long()

    def _sample(self, position: int) -> bytes:
        epoch, offset = divmod(position, self.windows)
        return self._read(permuted(offset, self.windows, self._seed, epoch) * self._window, self._window)

    def _read(self, offset: int, length: int) -> bytes:
        parts: list[bytes] = []
        file = bisect_right(self._ends, offset)
        while length > 0:
            start = self._ends[file - 1] if file else 0
            wanted = min(length, self._ends[file] - offset)
            parts.append(_read_file(self._paths[file], offset - start, wanted))
            offset, length, file = offset + wanted, length - wanted, file + 1
        return b"".join(parts)


def inputs_of(samples: torch.Tensor) -> torch.Tensor:
    """What the first stage reads: all tokens but the last."""
    return samples[:, :-1].contiguous()


def targets_of(samples: torch.Tensor) -> torch.Tensor:
    """What the last stage compares with: each position's next token."""
    return samples[:, 1:].contiguous()


def check_same_data(fingerprints: Sequence[int]) -> None:
    """Raise ConfigurationError unless the first and the last stage see the same files."""
    if fingerprints[0] != fingerprints[-1]:
        raise ConfigurationError(
            f"spec.train.data.files: stage 0 and stage {len(fingerprints) - 1} see different files or sizes; "
            "allowed: the same files in every stage's container; use one image and a volume that all stages "
            "share"
        )


def _files(patterns: Sequence[str]) -> list[str]:
    # Path.glob takes no absolute patterns.
    found = {path for pattern in patterns for path in glob.iglob(pattern, recursive=True)}  # noqa: PTH207
    return sorted(path for path in found if Path(path).is_file())


def _readable_size(path: str) -> int:
    try:
        with Path(path).open("rb") as file:
            return file.seek(0, os.SEEK_END)
    except OSError as error:
        raise ConfigurationError(
            f"spec.train.data.files: {path} cannot be read: {error.strerror}; allowed: files that the "
            "worker's user may read; change their mode or the pod's securityContext"
        ) from error


def _read_file(path: str, offset: int, length: int) -> bytes:
    with Path(path).open("rb") as file:
        file.seek(offset)
        data = file.read(length)
    if len(data) < length:
        raise ConfigurationError(
            f"spec.train.data.files: {path} has become shorter while it was read; allowed: files that do not "
            "change during training; restore it or train on a copy"
        )
    return data
