"""From spec.train.data to token ids on disk."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipelinejob_worker.data import cache
from pipelinejob_worker.data.arrays import array_files
from pipelinejob_worker.data.dataset import arrow_files, dataset_pieces
from pipelinejob_worker.data.documents import Piece, json_pieces, text_pieces
from pipelinejob_worker.data.files import Stamp, find, stamps_of
from pipelinejob_worker.data.refusal import refusal
from pipelinejob_worker.data.tokenizer import tokenizer_of
from pipelinejob_worker.data.tokens import Ids, TokenFile
from pipelinejob_worker.protocol.train import Data

_CACHE_VERSION = 1
"""Grows when the same text and tokenizer are to give other ids."""


class OpenTokens(NamedTuple):
    """Documents as tokens."""

    files: list[TokenFile]
    ends: Ids
    """Where in the stream each document ends, ascending."""
    identity: str
    """What determines the stream; equal for equal tokens."""


def open_tokens(data: Data, vocabulary: int, model_directory: str, directory: Path) -> OpenTokens:
    """Return the tokens of all documents, in the order of their sorted paths.

    Bytes of text files and arrays of ids are read where they lie; all else is tokenised first into ``directory``.
    With packing Documents a document of fewer than two tokens is left out, since it has nothing to predict.
    """
    paths = find(data)
    minimum = 2 if data.packing == "Documents" else 0
    if data.format == "Tokens":
        arrays = array_files(paths)
        return _in_place(arrays, minimum, [f"{file.path} {file.tokens} {file.dtype.str}" for file in arrays])
    tokenizer = tokenizer_of(data, vocabulary, model_directory)
    if data.format == "Text" and data.tokenizer == "Bytes":
        files = [TokenFile(stamp.path, np.dtype(np.uint8), stamp.size) for stamp in stamps_of(paths)]
        return _in_place(files, minimum, [f"{file.path} {file.tokens}" for file in files])
    stamps = stamps_of(arrow_files(paths) if data.format == "Dataset" else paths)
    settings = [_CACHE_VERSION, data.format, data.text_field, tokenizer.identity, vocabulary, minimum]
    entry = directory / hashlib.sha256(json.dumps([settings, stamps]).encode()).hexdigest()
    found = cache.load(entry)
    if not found:
        with cache.locked(entry):
            found = cache.load(entry) or cache.build(entry, _pieces(data, stamps), tokenizer, vocabulary, minimum)
    return OpenTokens([found.tokens], found.ends, found.sha256)


def _in_place(files: Sequence[TokenFile], minimum: int, listing: Sequence[str]) -> OpenTokens:
    kept = [file for file in files if file.tokens >= minimum]
    return OpenTokens(kept, np.fromiter(accumulate(file.tokens for file in kept), np.int64), "\n".join(listing))


def _pieces(data: Data, stamps: Sequence[Stamp]) -> Iterator[Piece]:
    paths = [stamp.path for stamp in stamps]
    match data.format:
        case "JsonLines":
            pieces = json_pieces(paths, data.text_field)
        case "Dataset":
            pieces = dataset_pieces(paths, data.text_field)
        case _:
            pieces = text_pieces(paths)
    return unchanged(pieces, stamps)


def unchanged(pieces: Iterator[Piece], stamps: Sequence[Stamp]) -> Iterator[Piece]:
    """Pass the pieces on, and refuse to end when a file has changed since its stamp."""
    yield from pieces
    for before, now in zip(stamps, stamps_of([stamp.path for stamp in stamps]), strict=True):
        if before != now:
            raise refusal(
                "files",
                f"{now.path} has changed while it was read",
                "files that do not change during training",
                "train on a copy",
            )
