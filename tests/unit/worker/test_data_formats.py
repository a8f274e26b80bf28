"""Every format is read as it is, or refused with the place and the cure."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest

from pipelinejob_worker.data import Corpus
from pipelinejob_worker.data.documents import LINE_LIMIT_BYTES
from pipelinejob_worker.errors import ConfigurationError
from tests.unit.worker.corpora import epoch, train

datasets.disable_progress_bars()

UNICODE = ["naïve café", "日本語のテキスト", "🙂 and \r\n lines\n\n"]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def windows(pattern: str, cache: Path, size: int, **data: Any) -> list[int]:
    """All bytes of a corpus that is one sample of ``size`` tokens."""
    (found,) = epoch(Corpus(train(pattern, batch=1, **data), context=size - 1, vocabulary=256, cache=cache), 1)
    return found


def refused(pattern: str, cache: Path, message: str, vocabulary: int = 256, **data: Any) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        Corpus(train(pattern, **data), context=3, vocabulary=vocabulary, cache=cache)
    assert "\n" not in str(caught.value)
    assert str(caught.value).count("; ") >= 2  # what is allowed, and the cure


class TestJsonLines:
    """format: JsonLines."""

    def test_text_is_read_from_the_field_of_each_line(self, tmp_path: Path, cache: Path) -> None:
        lines = [
            json.dumps({"n": 1, "body": text}, ensure_ascii=escaped)
            for text, escaped in zip(UNICODE, (True, False, True), strict=True)
        ]
        (tmp_path / "a.jsonl").write_text(f"{lines[0]}\r\n\n  \n{lines[1]}\n")
        (tmp_path / "b.jsonl").write_text(lines[2])  # no line end at the end
        text = "".join(UNICODE).encode()
        found = windows(f"{tmp_path}/*.jsonl", cache, len(text), format="JsonLines", textField="body")
        assert bytes(found) == text

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (b"{", r"files: \S+a\.jsonl:3 is no JSON: .*; allowed: a JSON object on every line"),
            (b"[" * 100_000, r"files: \S+a\.jsonl:3 is no JSON: maximum recursion"),
            (b'{"text": ' + b"9" * 5000 + b"}", r"files: \S+a\.jsonl:3 is no JSON: Exceeds the limit"),
            (b'["text"]', r"files: \S+a\.jsonl:3 is of type list; allowed: a JSON object"),
            (b'{"text": "\xe9"}', r"files: \S+a\.jsonl:3 is no UTF-8: byte 0xe9: .*; allowed: text in UTF-8"),
            (b'{"text": "\\ud800"}', r"files: \S+a\.jsonl:3 has half a surrogate pair at character 0"),
            (b'{"body": "a", "n": 1}', r"textField: \S+a\.jsonl:3 has no field 'text'; .* here 'body', 'n'; set it"),
            (b"{}", r"textField: \S+a\.jsonl:3 has no field 'text'; .* here none"),
            (b'{"text": null}', r"textField: \S+a\.jsonl:3 has a value of type NoneType in field 'text'"),
            (b'{"text": 12}', r"textField: \S+a\.jsonl:3 has a value of type int in field 'text'; allowed: a string"),
        ],
    )
    def test_a_line_without_text_is_refused(self, line: bytes, message: str, tmp_path: Path, cache: Path) -> None:
        (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": "never read"}\n')
        refused(f"{tmp_path}/*.jsonl", cache, rf"spec\.train\.data\.{message}", format="JsonLines")

    def test_a_line_that_fits_no_memory_is_refused(self, tmp_path: Path, cache: Path) -> None:
        with (tmp_path / "a.jsonl").open("wb") as file:
            file.write(b'{"text": "fine"}\n')
            file.seek(LINE_LIMIT_BYTES + 1, 1)  # a hole: no space on the disk
            file.write(b"\n")
        refused(f"{tmp_path}/*.jsonl", cache, r"a\.jsonl:2 is longer than 64 MiB; allowed: shorter", format="JsonLines")


class TestTokens:
    """format: Tokens."""

    @pytest.mark.parametrize("kind", ["uint8", "int8", ">u2", "<u4", ">i8", "uint64"])
    def test_arrays_of_any_integer_type_are_read(self, kind: str, tmp_path: Path, cache: Path) -> None:
        np.save(tmp_path / "a.npy", np.arange(50, dtype=kind))
        np.save(tmp_path / "b.npy", np.arange(0, dtype=kind))
        np.save(tmp_path / "c.npy", np.arange(50, 100, dtype="<i4"))
        assert windows(f"{tmp_path}/*.npy", cache, 100, format="Tokens") == list(range(100))
        assert not cache.exists()

    @pytest.mark.parametrize(
        ("array", "message"),
        [
            (np.zeros((10, 10), np.int64), r"has shape \[10, 10\] and type int64; allowed: whole \.npy files with int"),
            (np.zeros(100), r"has shape \[100\] and type float64"),
            (np.zeros(100, bool), r"has shape \[100\] and type bool"),
            (np.zeros((), np.int64), r"has shape \[\] and type int64"),
            (np.array(["a"] * 100), r"has shape \[100\] and type <U1"),
        ],
    )
    def test_other_arrays_are_refused(self, array: np.ndarray, message: str, tmp_path: Path, cache: Path) -> None:
        np.save(tmp_path / "a.npy", array)
        refused(f"{tmp_path}/*.npy", cache, rf"spec\.train\.data\.files: \S+a\.npy {message}", format="Tokens")

    @pytest.mark.parametrize("keep", [0, 5, 100, -2])
    def test_a_file_that_is_cut_is_refused(self, keep: int, tmp_path: Path, cache: Path) -> None:
        file = tmp_path / "a.npy"
        np.save(file, np.arange(100))
        file.write_bytes(file.read_bytes()[:keep])
        refused(str(file), cache, r"a\.npy is no whole \.npy file", format="Tokens")

    def test_nothing_is_unpickled(self, tmp_path: Path, cache: Path) -> None:
        np.save(tmp_path / "a.npy", np.array([{}], object), allow_pickle=True)
        refused(f"{tmp_path}/a.npy", cache, r"a\.npy is no whole \.npy file", format="Tokens")
        (tmp_path / "b.npy").write_bytes(b"\x80\x04N.")
        refused(f"{tmp_path}/b.npy", cache, r"b\.npy is no whole \.npy file", format="Tokens")

    def test_an_archive_is_refused(self, tmp_path: Path, cache: Path) -> None:
        np.savez(tmp_path / "a.npz", np.arange(100))
        refused(f"{tmp_path}/a.npz", cache, r"a\.npz is a \.npz archive", format="Tokens")

    @pytest.mark.parametrize(
        ("kind", "wrong", "vocabulary"),
        [("int64", -1, 256), ("uint16", 256, 256), ("uint64", 2**63 + 1, 256), ("uint8", 200, 200)],
    )
    def test_ids_that_the_model_does_not_know_are_refused_where_they_are_read(
        self, kind: str, wrong: int, vocabulary: int, tmp_path: Path, cache: Path
    ) -> None:
        array = np.zeros(100, kind)
        array[70] = wrong
        np.save(tmp_path / "a.npy", array)
        corpus = Corpus(train(f"{tmp_path}/*.npy", batch=10, format="Tokens"), context=9, vocabulary=vocabulary)
        message = rf"a\.npy has token id {wrong} at index 70; allowed: 0 to {vocabulary - 1}, .*; use the tokens"
        with pytest.raises(ConfigurationError, match=message):
            corpus.samples(0, 0, 10)

    def test_another_type_is_other_data(self, tmp_path: Path, cache: Path) -> None:
        prints = set()
        for kind in ("<u2", ">u2"):
            np.save(tmp_path / "a.npy", np.zeros(100, kind))
            prints.add(Corpus(train(f"{tmp_path}/a.npy", format="Tokens"), 3, 256).fingerprint)
        assert len(prints) == 2


def save(directory: Path, **columns: Any) -> Path:
    datasets.Dataset.from_dict(columns).save_to_disk(directory)
    return directory


class TestDataset:
    """format: Dataset."""

    @pytest.mark.parametrize("kind", ["string", "large_string"])
    @pytest.mark.parametrize("shards", [1, 3])
    def test_text_is_read_from_the_column(self, kind: str, shards: int, tmp_path: Path, cache: Path) -> None:
        features = datasets.Features({"n": datasets.Value("int64"), "body": datasets.Value(kind)})
        dataset = datasets.Dataset.from_dict({"n": [1, 2, 3], "body": UNICODE}, features=features)
        dataset.save_to_disk(tmp_path / "set", num_shards=shards)
        text = "".join(UNICODE).encode()
        found = windows(f"{tmp_path}/set", cache, len(text), format="Dataset", textField="body")
        assert bytes(found) == text

    def test_rows_are_those_that_the_dataset_has_after_a_filter_and_a_sort(self, tmp_path: Path, cache: Path) -> None:
        dataset = datasets.Dataset.from_dict({"n": [3, 1, 2, 0], "text": ["c", "a", "b", "-"]})
        dataset.filter(lambda row: row["n"] > 0, keep_in_memory=True).sort("n").save_to_disk(tmp_path / "set")
        assert bytes(windows(f"{tmp_path}/set", cache, 3, format="Dataset")) == b"abc"

    def test_of_several_splits_train_is_read(self, tmp_path: Path, cache: Path) -> None:
        splits = {"test": ["wrong"], "train": ["right"]}
        datasets.DatasetDict(
            {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in splits.items()}
        ).save_to_disk(tmp_path / "sets")
        assert bytes(windows(f"{tmp_path}/sets", cache, 5, format="Dataset")) == b"right"

    def test_several_directories_follow_each_other_by_name(self, tmp_path: Path, cache: Path) -> None:
        save(tmp_path / "b", text=["cd"])
        save(tmp_path / "a", text=["ab"])
        save(tmp_path / "c", text=[])
        assert bytes(windows(f"{tmp_path}/[abc]", cache, 4, format="Dataset")) == b"abcd"

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"body": ["a"], "n": [1]}, r"textField: \S+\.arrow has no column 'text'; .*: 'body', 'n'; set it"),
            ({"text": [[1, 2]]}, r"textField: column 'text' of \S+\.arrow has type list<.*; allowed: a column of str"),
            ({"text": ["a", None]}, r"textField: \S+\.arrow: row 1 has null in column 'text'; allowed: a string in"),
        ],
    )
    def test_a_column_without_text_is_refused(
        self, columns: dict[str, Any], message: str, tmp_path: Path, cache: Path
    ) -> None:
        directory = save(tmp_path / "set", **columns)
        refused(str(directory), cache, rf"spec\.train\.data\.{message}", format="Dataset")

    def test_text_that_is_no_utf_8_is_refused(self, tmp_path: Path, cache: Path) -> None:
        directory = save(tmp_path / "set", text=["a"])
        (file,) = directory.glob("*.arrow")
        raw = pa.array([b"fine", b"\xff\xfe"])
        column = pa.StringArray.from_buffers(2, *raw.buffers()[1:])
        table = pa.table({"text": column})
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        refused(str(directory), cache, r"files: \S+\.arrow: row 1 is no UTF-8: invalid start byte", format="Dataset")

    @pytest.mark.parametrize(
        "damage",
        [
            lambda content: b"",
            lambda content: content[:-8],  # all batches are there, but who knows?
            lambda content: content[: len(content) // 2],
            lambda content: content[:4] + b"\xee" * 100 + content[104:],
        ],
    )
    def test_a_damaged_file_is_refused(self, damage: Callable[[bytes], bytes], tmp_path: Path, cache: Path) -> None:
        directory = save(tmp_path / "set", text=["a" * 100])
        (file,) = directory.glob("*.arrow")
        file.write_bytes(damage(file.read_bytes()))
        refused(str(directory), cache, r"files: \S+\.arrow is no whole Arrow stream: .*", format="Dataset")

    def test_a_missing_file_is_refused(self, tmp_path: Path, cache: Path) -> None:
        directory = save(tmp_path / "set", text=["a" * 100])
        next(directory.glob("*.arrow")).unlink()
        refused(str(directory), cache, r"files: \S+\.arrow cannot be read: No such file", format="Dataset")

    @pytest.mark.parametrize("state", ["{", "[]", '{"_data_files": [1]}'])
    def test_a_damaged_list_of_files_is_refused(self, state: str, tmp_path: Path, cache: Path) -> None:
        directory = save(tmp_path / "set", text=["a" * 100])
        (directory / "state.json").write_text(state)
        refused(str(directory), cache, r"files: \S+state\.json lists no Arrow files: ", format="Dataset")

    def test_other_directories_are_refused(self, tmp_path: Path, cache: Path) -> None:
        (tmp_path / "set").mkdir()
        refused(f"{tmp_path}/set", cache, r"files: \S+set has neither state\.json nor", format="Dataset")
        refused(f"{tmp_path}/none", cache, "files: no directory matches", format="Dataset")
        datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": ["a"]})}).save_to_disk(tmp_path / "sets")
        refused(
            f"{tmp_path}/sets", cache, r"sets has no split named train; allowed: .* split: test; name", format="Dataset"
        )
