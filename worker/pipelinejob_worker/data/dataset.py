"""Documents of directories that the datasets library saved (save_to_disk), read without that library.

Such a directory has ``state.json``, which lists its Arrow stream files; one of several splits (a DatasetDict) has
``dataset_dict.json`` and a directory for each split.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]

from pipelinejob_worker.data.documents import Piece, pieces_of
from pipelinejob_worker.data.refusal import refusal, unreadable

_SPLIT = "train"
_END = b"\xff\xff\xff\xff\0\0\0\0"
"""The last bytes of a whole Arrow stream."""

_SAVED = "directories that datasets' save_to_disk wrote"


def arrow_files(directories: Sequence[str]) -> list[str]:
    """Return the Arrow files of all datasets in their order; of several splits the one named train.

    Raises ConfigurationError for a directory that is none, or that has no split of this name.
    """
    datasets = sorted({_dataset_in(Path(directory)) for directory in directories})
    return [str(dataset / name) for dataset in datasets for name in _names(dataset)]


def dataset_pieces(paths: Sequence[str], column: str) -> Iterator[Piece]:
    """Read the documents in ``column`` of Arrow stream files, mapped into memory.

    Raises ConfigurationError for a file that is not whole, and for a column that is missing or has no text, with the
    row, counted in its file from 0.
    """
    for path in paths:
        _check_end(path)
        row = 0
        try:
            with pa.memory_map(path) as source, pa.ipc.open_stream(source) as stream:
                _check_column(stream.schema, path, column)
                for batch in stream:
                    for value in batch.column(column):
                        where = f"{path}: row {row}"
                        yield from pieces_of(_text_of(value, where, column), where)
                        row += 1
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, str(error)) from error


def _dataset_in(directory: Path) -> Path:
    if (directory / "state.json").is_file():
        return directory
    if not (directory / "dataset_dict.json").is_file():
        raise refusal(
            "files",
            f"{directory} has neither state.json nor dataset_dict.json",
            _SAVED,
            "name such a directory, or use format JsonLines or Text",
        )
    if not (directory / _SPLIT / "state.json").is_file():
        splits = sorted(path.parent.name for path in directory.glob("*/state.json"))
        raise refusal(
            "files",
            f"{directory} has no split named {_SPLIT}",
            f"the directory of one split: {', '.join(splits) or 'there is none'}",
            "name it",
        )
    return directory / _SPLIT


def _names(dataset: Path) -> list[str]:
    path = dataset / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return [str(entry["filename"]) for entry in state["_data_files"]]
    except OSError as error:
        raise unreadable(str(path), error) from error
    except (ValueError, LookupError, TypeError) as error:
        raise refusal("files", f"{path} lists no Arrow files: {error!r}", _SAVED, "save the dataset again") from error


def _check_end(path: str) -> None:
    """A file that was cut between two batches would pass as a shorter one."""
    with Path(path).open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - len(_END)))
        if file.read() != _END:
            raise _damaged(path, "its end is missing")


def _check_column(schema: pa.Schema, path: str, column: str) -> None:
    if schema.names.count(column) != 1:
        names = ", ".join(map(repr, schema.names[:8])) or "none"
        raise refusal("textField", f"{path} has no column {column!r}", f"a column of the dataset: {names}", "set it")
    kind = schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise refusal(
            "textField",
            f"column {column!r} of {path} has type {kind}",
            "a column of strings",
            "name another column; token ids are read from .npy files with format Tokens",
        )


def _text_of(value: pa.Scalar, where: str, column: str) -> str:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        raise refusal(
            "files", f"{where} is no UTF-8: {error.reason}", "text in UTF-8", "correct or filter out the row"
        ) from error
    if text is None:
        raise refusal(
            "textField",
            f"{where} has null in column {column!r}",
            "a string in every row",
            "filter out the rows without text and save the dataset again",
        )
    return str(text)


def _damaged(path: str, problem: str) -> Exception:
    return refusal("files", f"{path} is no whole Arrow stream: {problem}", _SAVED, "save or copy the dataset again")
