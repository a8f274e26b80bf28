"""A file of requests and the file of their answers, each exactly once whatever crashes.

Whoever answers writes a *part* of its own beside the output, ``OUTPUT.part-N``, one answer a line in the order in which
they end, behind a line that says which input they are of. A part is only ever appended to, by the one process that has
made it; what a crash has torn is its last line, which has no end and is not counted. A successor reads all parts,
answers what none of them has, and when all is there puts them together in the order of the input, once each: in a new
file, which becomes the output by its name, all at once. So a predecessor that was only cut off, and comes back late,
changes nothing: what it adds to its part is there twice, and taken once.
"""

import hashlib
import json
import os
import re
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import BinaryIO, Self

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.state.files import sync_directory

LINE_LIMIT_BYTES = 4 << 20
"""Longest line of the input; longer ones are answered with an error."""

_HASHED_BYTES = 1 << 20
_ID = re.compile(rb'\{"id":"batch_req_(\d{1,12})"[,}]')


def identity(number: int) -> str:
    """Return the id of the answer to the request on line ``number``, counted from 0."""
    return f"batch_req_{number}"


@dataclass(frozen=True)
class Requests:
    """The input: its lines that are not blank are the requests. It must not change while it is being answered."""

    path: Path
    count: int
    """Number of requests."""

    lines: int
    fingerprint: str

    @classmethod
    def of(cls, path: Path) -> Self:
        """Count the requests. Raises ConfigurationError when the file cannot be read."""
        try:
            with path.open("rb") as file:
                head = hashlib.sha256(file.read(_HASHED_BYTES)).hexdigest()[:16]
                file.seek(0)
                count = lines = 0
                for line in _lines(file, LINE_LIMIT_BYTES):
                    count += bool(line.strip())
                    lines += 1
                return cls(path, count, lines, f"{file.tell()} bytes, begins with {head}")
        except OSError as error:
            raise ConfigurationError(
                f"spec.batch.input: {path} cannot be read: {error.strerror}; allowed: a file in stage 0's container; "
                "mount its volume with spec.template"
            ) from error

    def __iter__(self) -> Iterator[tuple[int, bytes | None]]:
        """Yield each request with the number of its line; None in place of one that is too long."""
        with self.path.open("rb") as file:
            for number, line in enumerate(_lines(file, LINE_LIMIT_BYTES)):
                if line.strip():
                    yield number, line if len(line) <= LINE_LIMIT_BYTES else None


class Answers:
    """The answers to some requests: those that earlier processes have left, and the part that this one writes."""

    def __init__(self, output: Path, requests: Requests) -> None:
        """Find what is answered, and begin a part. Raises ConfigurationError."""
        self._output = output
        self._requests = requests
        self.answered = bytearray(requests.lines)
        """1 for each line whose request has an answer."""
        self._part: BinaryIO | None = None
        self.count = 0
        """Number of requests with an answer."""
        try:
            self._begin()
        except OSError as error:
            raise ConfigurationError(
                f"spec.batch.output: {output} cannot be written: {error.strerror}; allowed: a file in a directory that "
                "the worker's user may write in, on a volume that outlives the pod"
            ) from error

    @property
    def complete(self) -> bool:
        """Whether the output is there."""
        return self._part is None

    def append(self, number: int, answer: dict[str, object]) -> None:
        """Write the answer to the request on line ``number``, which has none yet. Raises OSError."""
        assert self._part
        assert not self.answered[number]
        line = json.dumps({"id": identity(number), **answer}, ensure_ascii=False, separators=(",", ":"))
        self._part.write(line.encode() + b"\n")
        self._part.flush()
        self._count(number)

    def sync(self) -> None:
        """Have what is written reach the volume. Raises OSError."""
        if self._part:
            os.fsync(self._part.fileno())

    def finish(self) -> None:
        """Turn the parts into the output; every request has an answer. Raises OSError."""
        assert self._part
        self._part.close()
        self._part = None
        parts = [path for _, path in self._parts()]
        _merge(parts, self._output, self._requests)
        for path in parts:
            path.unlink()

    def close(self) -> None:
        """Leave the part as it is, for a successor."""
        if self._part:
            self._part.close()

    def _begin(self) -> None:
        parts = self._parts()
        if self._output.exists():
            self._check_output()
            for _, path in parts:
                path.unlink()
            return
        for _, path in parts:
            with path.open("rb") as file:
                self._check_header(path, file.readline())
                for number, _ in _answers(file):
                    self._count(number)
        number = max((number for number, _ in parts), default=0) + 1
        self._part = self._part_path(number).open("xb")
        self._part.write(json.dumps({"input": self._requests.fingerprint}).encode() + b"\n")
        self._part.flush()

    def _count(self, number: int) -> None:
        self.count += not self.answered[number]
        self.answered[number] = 1

    def _check_header(self, path: Path, line: bytes) -> None:
        if not line.endswith(b"\n"):
            return  # its writer ended before it wrote anything
        if json.loads(line) != {"input": self._requests.fingerprint}:
            raise ConfigurationError(
                f"spec.batch.output: {path} holds answers to another input; allowed: the input that it was begun with; "
                "name another output, or delete the parts of this one"
            )

    def _check_output(self) -> None:
        """It is there if a predecessor made it and ended before it could say so."""
        with self._output.open("rb") as file:
            found = (number for number, _ in _answers(file))
            wanted = (number for number, _ in self._requests)
            same = all(one == other for one, other in zip_longest(found, wanted))
        if not same:
            raise ConfigurationError(
                f"spec.batch.output: {self._output} exists and is not the answer to {self._requests.path}; allowed: a "
                "new file; name another one, or delete it"
            )
        for number, _ in self._requests:
            self._count(number)

    def _parts(self) -> list[tuple[int, Path]]:
        """The parts in the order in which they were begun."""
        pattern = re.compile(re.escape(self._output.name) + r"\.part-(\d{1,9})")
        found = ((pattern.fullmatch(path.name), path) for path in self._output.parent.iterdir())
        return sorted((int(name[1]), path) for name, path in found if name)

    def _part_path(self, number: int) -> Path:
        return self._output.with_name(f"{self._output.name}.part-{number}")


def _merge(parts: list[Path], output: Path, requests: Requests) -> None:
    """Put the first answer to each request into ``output``, in the order of the requests."""
    places = array("q", [-1]) * requests.lines
    part_of = array("I", [0]) * requests.lines
    for index, path in enumerate(parts):
        with path.open("rb") as file:
            for number, place in _answers(file):
                if number < requests.lines and places[number] < 0:
                    places[number], part_of[number] = place, index
    descriptor, name = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.")
    with ExitStack() as stack:
        merged = stack.enter_context(os.fdopen(descriptor, "wb"))
        files = [stack.enter_context(path.open("rb")) for path in parts]
        for number, _ in requests:
            file = files[part_of[number]]
            file.seek(places[number])
            merged.write(file.readline())
        merged.flush()
        os.fsync(merged.fileno())
    Path(name).chmod(0o644)
    Path(name).replace(output)
    sync_directory(output.parent)


def _answers(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Yield the number of each whole answer and where its line begins; what a crash has torn is passed over."""
    while True:
        place = file.tell()
        line = file.readline()
        if not line:
            return
        if line.endswith(b"\n") and (found := _ID.match(line)) and _is_json(line):
            yield int(found[1]), place


def _lines(file: BinaryIO, limit: int) -> Iterator[bytes]:
    """Yield lines; of one longer than ``limit`` only so much that it can be seen to be longer."""
    while line := file.readline(limit + 1):
        if len(line) > limit and not line.endswith(b"\n"):
            while (rest := file.readline(limit)) and not rest.endswith(b"\n"):
                pass
        yield line


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
