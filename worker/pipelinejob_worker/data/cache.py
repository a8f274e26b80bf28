"""Text that is tokenised once and kept as token ids, however often its samples are read.

A finished entry is a directory ``<key>`` with ``tokens`` (ids), ``ends`` (int64, where each document ends) and
``manifest.json``. The key names everything that determines the ids, so an entry never becomes wrong: other text,
another tokenizer or a changed file has another one.
"""

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import structlog
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from pipelinejob_worker.data.documents import PIECE_SIZE, Piece
from pipelinejob_worker.data.refusal import refusal
from pipelinejob_worker.data.tokenizer import Tokenizer
from pipelinejob_worker.data.tokens import Ids, TokenFile
from pipelinejob_worker.state.files import replace, sync_directory

log = structlog.get_logger()

_BATCH_PIECES = 1024
_REPORT_SECONDS = 30.0


class Manifest(BaseModel):
    """What an entry holds."""

    dtype: str
    tokens: int
    documents: int
    sha256: str
    """Of all ids and all ends."""


class Entry(NamedTuple):
    """A finished entry."""

    tokens: TokenFile
    ends: Ids
    sha256: str


def load(directory: Path) -> Entry | None:
    """Return the entry in ``directory``; None if there is no whole one."""
    try:
        manifest = Manifest.model_validate_json((directory / "manifest.json").read_bytes())
        dtype = np.dtype(manifest.dtype)
        sizes = [(directory / name).stat().st_size for name in ("tokens", "ends")]
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None
    whole = sizes == [manifest.tokens * dtype.itemsize, manifest.documents * 8]
    return _entry(directory, manifest) if whole else None


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Let one process at a time make the entry ``directory``. The lock ends with the process that holds it."""
    with _writing(directory):
        directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = directory.with_name(f"{directory.name}.lock").open("ab")
    with file:
        with _writing(directory):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("another process tokenises the same text: waiting for it", cache=str(directory))
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(directory: Path, pieces: Iterable[Piece], tokenizer: Tokenizer, vocabulary: int, minimum: int) -> Entry:
    """Tokenise ``pieces`` into the entry ``directory``, which appears when it is whole. The caller holds its lock.

    Documents of fewer than ``minimum`` tokens are left out. Raises ConfigurationError for text that cannot be
    tokenised, and when the cache cannot be written.
    """
    partial = directory.with_name(f"{directory.name}.partial")
    with _writing(directory):
        for left_behind in (partial, directory):
            if left_behind.exists():
                shutil.rmtree(left_behind)
        partial.mkdir(mode=0o700)
    started = reported = time.monotonic()
    writer = _Writer(partial, np.min_scalar_type(vocabulary - 1), minimum)
    for batch in _batches(pieces):
        writer.add(batch, tokenizer.encode(batch))
        if time.monotonic() - reported >= _REPORT_SECONDS:
            reported = time.monotonic()
            log.info("tokenising", tokens=writer.tokens, documents=writer.documents, at=batch[-1].where)
    manifest = writer.finish()
    with _writing(directory):
        replace(partial / "manifest.json", manifest.model_dump_json().encode())
        partial.rename(directory)
        sync_directory(directory.parent)
    seconds = round(time.monotonic() - started, 3)
    log.info("tokenised", tokens=manifest.tokens, documents=manifest.documents, seconds=seconds)
    return _entry(directory, manifest)


def _entry(directory: Path, manifest: Manifest) -> Entry:
    # An empty file cannot be mapped.
    ends = np.memmap(directory / "ends", np.int64, "r") if manifest.documents else np.empty(0, np.int64)
    return Entry(TokenFile(str(directory / "tokens"), np.dtype(manifest.dtype), manifest.tokens), ends, manifest.sha256)


class _Writer:
    """The two files of an entry that is being made."""

    def __init__(self, directory: Path, dtype: np.dtype[np.unsignedinteger], minimum: int) -> None:
        self._tokens, self._ends = directory / "tokens", directory / "ends"
        self._dtype = dtype
        self._minimum = minimum
        self._hash = hashlib.sha256()
        self._held: list[Ids] = []
        """The document so far, as long as it has too few tokens."""
        self._length = 0
        """Tokens of the document so far."""
        self.tokens = 0
        self.documents = 0

    def add(self, pieces: Sequence[Piece], ids: Sequence[Ids]) -> None:
        """Write the next pieces."""
        ready: list[Ids] = []
        ends: list[int] = []
        for piece, found in zip(pieces, ids, strict=True):
            self._held.append(found)
            self._length += len(found)
            if self._length >= self._minimum:
                ready += self._held
                self.tokens += sum(map(len, self._held))
                self._held = []
                if piece.last:
                    ends.append(self.tokens)
            if piece.last:
                self._held, self._length = [], 0
        self.documents += len(ends)
        self._append(self._tokens, [found.astype(self._dtype) for found in ready])
        self._append(self._ends, [np.array(ends, np.int64)])

    def finish(self) -> Manifest:
        """Wait until all is on the disk and return what it is."""
        for path in (self._tokens, self._ends):
            with _writing(path.parent), path.open("ab") as file:
                os.fsync(file.fileno())
        return Manifest(
            dtype=self._dtype.name, tokens=self.tokens, documents=self.documents, sha256=self._hash.hexdigest()
        )

    def _append(self, path: Path, arrays: Sequence[NDArray[np.integer]]) -> None:
        data = b"".join(array.tobytes() for array in arrays)
        self._hash.update(data)
        with _writing(path.parent), path.open("ab") as file:
            file.write(data)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Collect pieces until there is work for all threads of the tokenizer; memory stays bounded."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= PIECE_SIZE or len(batch) >= _BATCH_PIECES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise refusal(
            "files",
            f"the tokenised text cannot be kept in {directory.parent}: {error.strerror or error}",
            "a writable directory with room for 1 to 4 bytes a token",
            "mount a larger volume there, or tokenise beforehand and use format Tokens",
        ) from error
