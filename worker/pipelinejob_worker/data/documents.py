"""Documents as pieces of text of bounded size, from text files and JSON lines."""

import codecs
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pipelinejob_worker.data.refusal import refusal

PIECE_SIZE = 1 << 20
"""A longer document is tokenised in pieces, which end at the first line end after this many characters (bytes in a
text file), or after twice as many: so memory does not grow with the documents.
"""

LINE_LIMIT_BYTES = 64 << 20
"""Longest line of a JSON lines file; the whole line must be in memory to be read."""


class Piece(NamedTuple):
    """A part of a document."""

    text: str
    where: str
    """File and line, for messages."""
    first: bool
    """Whether the document begins with it."""
    last: bool
    """Whether the document ends with it."""


def text_pieces(paths: Sequence[str], size: int = PIECE_SIZE) -> Iterator[Piece]:
    """Read text files, each of which is a document in UTF-8.

    Raises ConfigurationError that names file and line of the first byte that is no UTF-8.
    """
    for path in paths:
        yield from marked(_decoded(path, size))


def json_pieces(paths: Sequence[str], field: str) -> Iterator[Piece]:
    """Read JSON lines, each of which is an object with a document in ``field``; lines of white space are skipped.

    Raises ConfigurationError that names file and line for a line that is too long, no UTF-8, no JSON object, or has
    no text in ``field``.
    """
    for path in paths:
        with Path(path).open("rb") as file:
            number = 0
            while line := file.readline(LINE_LIMIT_BYTES + 1):
                number += 1
                if not line.isspace():
                    where = f"{path}:{number}"
                    yield from pieces_of(_text_of(line, where, field), where)


def pieces_of(document: str, where: str, size: int = PIECE_SIZE) -> Iterator[Piece]:
    """Cut a document; an empty one has no piece."""
    reader = io.StringIO(document, newline="")
    return marked((where, part) for part in iter(lambda: reader.read(size) + reader.readline(size), ""))


def marked(parts: Iterable[tuple[str, str]]) -> Iterator[Piece]:
    """Mark the first and the last of a document's parts, given as (where, text)."""
    before: tuple[str, str] | None = None
    first = True
    for part in parts:
        if before:
            yield Piece(before[1], before[0], first, last=False)
            first = False
        before = part
    if before:
        yield Piece(before[1], before[0], first, last=True)


def _decoded(path: str, size: int) -> Iterator[tuple[str, str]]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    with Path(path).open("rb") as file:
        while data := file.read(size) + file.readline(size):
            yield f"{path}:{line}", _decode(decoder, data, path, line)
            line += data.count(b"\n")
    _decode(decoder, b"", path, line)


def _decode(decoder: codecs.IncrementalDecoder, data: bytes, path: str, line: int) -> str:
    """Decode the next bytes of a file; no bytes end it."""
    try:
        return decoder.decode(data, final=not data)
    except UnicodeDecodeError as error:
        wrong = line + error.object[: error.start].count(b"\n")
        raise _no_utf_8(f"{path}:{wrong}", error) from error


def _text_of(line: bytes, where: str, field: str) -> str:
    if len(line) > LINE_LIMIT_BYTES:
        raise refusal(
            "files",
            f"{where} is longer than {LINE_LIMIT_BYTES >> 20} MiB",
            "shorter lines, each with one object",
            "cut the document, or use format Text for a file that is one document",
        )
    try:
        found = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _no_utf_8(where, error) from error
    except (ValueError, RecursionError) as error:
        raise _no_object(where, f"is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise _no_object(where, f"is of type {type(found).__name__}")
    if field not in found:
        names = ", ".join(repr(name[:64]) for name in list(found)[:8]) or "none"
        raise refusal("textField", f"{where} has no field {field!r}", f"a field of every line, here {names}", "set it")
    text = found[field]
    if not isinstance(text, str):
        raise refusal(
            "textField",
            f"{where} has a value of type {type(text).__name__} in field {field!r}",
            "a string in every line",
            "name another field, or correct or remove the line",
        )
    _check_text(text, where)
    return text


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise refusal(
            "files",
            f"{where} has half a surrogate pair at character {error.start} of its text",
            "text that can be written in UTF-8",
            "correct or remove the line",
        ) from error


def _no_object(where: str, problem: str) -> Exception:
    return refusal(
        "files",
        f"{where} {problem}",
        "a JSON object on every line",
        "correct or remove the line, or use format Text",
    )


def _no_utf_8(where: str, error: UnicodeDecodeError) -> Exception:
    return refusal(
        "files",
        f"{where} is no UTF-8: byte 0x{error.object[error.start]:02x}: {error.reason}",
        "text in UTF-8",
        "convert the file, for instance with iconv, or narrow the pattern to text",
    )
