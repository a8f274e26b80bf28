"""Text is tokenised once, by one process, and again when anything that determines the ids has changed."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
from structlog.testing import capture_logs

from pipelinejob_worker.data import Corpus
from pipelinejob_worker.data.documents import json_pieces
from pipelinejob_worker.data.files import stamps_of
from pipelinejob_worker.data.opening import unchanged
from pipelinejob_worker.errors import ConfigurationError
from tests.unit.worker.corpora import bpe, epoch, train, write
from tests.unit.worker.forked import call

CONTEXT = 3
LINES = [f"line {number} of the text" for number in range(50)]
TEXT = "".join(LINES).encode()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def pattern(tmp_path: Path) -> str:
    return write(tmp_path / "data", "JsonLines", LINES)


def corpus(pattern: str, cache: Path, vocabulary: int = 256, **data: Any) -> Corpus:
    return Corpus(train(pattern, batch=1, **{"format": "JsonLines", **data}), CONTEXT, vocabulary, cache=cache)


def tokenised(pattern: str, cache: Path, vocabulary: int = 256, **data: Any) -> bool:
    """Whether opening the corpus made a new entry."""
    with capture_logs() as logs:
        corpus(pattern, cache, vocabulary, **data)
    return [line["event"] for line in logs] == ["tokenised"]


def text_of(found: Corpus) -> list[list[int]]:
    """The windows of an epoch, in the order of the text."""
    return sorted(epoch(found, 1))


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.is_dir())


def test_text_is_tokenised_once(pattern: str, cache: Path) -> None:
    assert tokenised(pattern, cache)
    assert not tokenised(pattern, cache)
    first, second = corpus(pattern, cache), corpus(pattern, cache)
    assert first.fingerprint == second.fingerprint
    assert epoch(first, 1) == epoch(second, 1)
    size = CONTEXT + 1
    assert text_of(first) == sorted(list(TEXT[start : start + size]) for start in range(0, len(TEXT) - CONTEXT, size))


@pytest.mark.parametrize(
    ("vocabulary", "kind"), [(256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.uint32)]
)
def test_ids_take_as_few_bytes_as_the_vocabulary_allows(
    vocabulary: int, kind: type[np.unsignedinteger], pattern: str, cache: Path
) -> None:
    corpus(pattern, cache, vocabulary)
    (entry,) = entries(cache)
    assert np.fromfile(entry / "tokens", kind).tolist() == list(TEXT)
    assert np.fromfile(entry / "ends", np.int64).tolist() == np.cumsum([len(line) for line in LINES]).tolist()


class TestRebuilt:
    """Anything that determines the ids makes another entry."""

    def test_when_a_file_has_another_time(self, pattern: str, cache: Path) -> None:
        before = corpus(pattern, cache)
        file = Path(pattern).parent / "a.jsonl"
        status = file.stat()
        file.write_text(file.read_text().replace("line 3 ", "LINE 3 "))  # of the same size
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        after = corpus(pattern, cache)
        assert len(entries(cache)) == 2
        assert before.fingerprint != after.fingerprint
        assert [sum(window.count(ord("L")) for window in text_of(found)) for found in (before, after)] == [0, 1]

    def test_when_a_file_is_added(self, pattern: str, cache: Path) -> None:
        assert tokenised(pattern, cache)
        (Path(pattern).parent / "c.jsonl").write_text('{"text": "more"}')
        assert tokenised(pattern, cache)

    def test_when_a_setting_changes_that_changes_the_ids(self, pattern: str, cache: Path, tmp_path: Path) -> None:
        assert tokenised(pattern, cache)
        assert tokenised(pattern, cache, packing="Documents")
        for size in (290, 300):
            bpe(tmp_path / "tokenizer", size)
            settings = {"tokenizer": "HuggingFace", "tokenizerPath": str(tmp_path / "tokenizer")}
            assert tokenised(pattern, cache, vocabulary=400, **settings)
            assert not tokenised(pattern, cache, vocabulary=400, **settings)
        assert not tokenised(pattern, cache, validationPercent=20)  # the same tokens, cut in another way

    @pytest.mark.parametrize("name", ["tokens", "ends", "manifest.json"])
    def test_when_an_entry_is_not_whole(self, name: str, pattern: str, cache: Path) -> None:
        expected = text_of(corpus(pattern, cache))
        file = entries(cache)[0] / name
        file.write_bytes(file.read_bytes()[:-1])
        assert tokenised(pattern, cache)
        file.unlink()
        assert tokenised(pattern, cache)
        assert text_of(corpus(pattern, cache)) == expected


HOLD = """
import fcntl, sys
with open(sys.argv[1], "ab") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
"""


def opened(pattern: str, cache: Path, log: Path) -> int:
    """Open the corpus in a process of its own, which logs to ``log``; return the fingerprint."""
    with log.open("w") as file:
        structlog.configure(logger_factory=structlog.PrintLoggerFactory(file))
        return corpus(pattern, cache).fingerprint


def test_processes_share_one_entry_and_survive_the_death_of_its_maker(
    pattern: str, cache: Path, tmp_path: Path
) -> None:
    """Two find that another one makes the entry; it is killed; then one of them makes it, and the other uses it."""
    expected = corpus(pattern, tmp_path / "other").fingerprint
    (entry,) = entries(tmp_path / "other")
    partial = cache / f"{entry.name}.partial"
    partial.mkdir(parents=True)
    (partial / "tokens").write_bytes(b"half of it")
    pipes = [tmp_path / "first.log", tmp_path / "second.log"]
    for pipe in pipes:
        os.mkfifo(pipe)
    command = [sys.executable, "-c", HOLD, str(cache / f"{entry.name}.lock")]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as maker,
        ThreadPoolExecutor() as pool,
    ):
        assert maker.stdout
        assert maker.stdout.readline() == b"held\n"
        found = [pool.submit(call, opened, pattern, cache, pipe) for pipe in pipes]
        with pipes[0].open() as first, pipes[1].open() as second:
            assert "another process tokenises the same text" in first.readline()
            assert "another process tokenises the same text" in second.readline()
            maker.kill()
            rests = [first.read(), second.read()]
        assert [fingerprint.result() for fingerprint in found] == [expected, expected]
    assert sorted("tokenised" in rest for rest in rests) == [False, True]
    assert entries(cache) == [cache / entry.name]
    assert (cache / entry.name / "tokens").read_bytes() == (entry / "tokens").read_bytes()


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let writes beyond ``size`` bytes of a file fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class TestRefusals:
    """What cannot be tokenised or kept leaves no entry, so that the next attempt does not take it for one."""

    @pytest.mark.parametrize("size", [0, 100, 900])
    def test_a_full_disk(self, size: int, pattern: str, cache: Path) -> None:
        message = r"data\.files: the tokenised text cannot be kept in \S+cache: File too large; allowed: .*; mount a"
        with files_of_at_most(size), pytest.raises(ConfigurationError, match=message):
            corpus(pattern, cache)
        assert tokenised(pattern, cache)

    def test_a_directory_that_cannot_be_made(self, pattern: str, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(ConfigurationError, match=r"cannot be kept in \S+file: File exists; allowed: a writable"):
            corpus(pattern, tmp_path / "file")

    def test_text_that_is_no_text(self, pattern: str, cache: Path) -> None:
        file = Path(pattern).parent / "b.jsonl"
        content = file.read_bytes()
        file.write_bytes(content + b"{")
        with pytest.raises(ConfigurationError, match=r"b\.jsonl:26 is no JSON"):
            corpus(pattern, cache)
        file.write_bytes(content)
        assert tokenised(pattern, cache)

    def test_a_file_that_changes_while_it_is_read(self, tmp_path: Path) -> None:
        file = tmp_path / "a.jsonl"
        file.write_text('{"text": "one"}\n{"text": "two"}\n')
        pieces = unchanged(json_pieces([str(file)], "text"), stamps_of([str(file)]))
        assert next(pieces).text == "one"
        with file.open("a") as appended:
            appended.write('{"text": "three"}\n')
        with pytest.raises(ConfigurationError, match=r"a\.jsonl has changed while it was read; allowed: .*; train on"):
            list(pieces)
