"""Packing Documents: no token meets another document, in any format."""

import random
from itertools import accumulate
from pathlib import Path

import pytest
import torch

from pipelinejob_worker.data import Batch, Corpus
from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.models import IGNORED
from tests.unit.worker.corpora import FORMATS, train, write

X = IGNORED


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def ordinals(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def rows(batch: Batch) -> list[tuple[list[int], list[int], list[int]]]:
    assert batch.positions is not None
    assert batch.positions.dtype == torch.int64
    return list(zip(batch.tokens.tolist(), batch.targets.tolist(), batch.positions.tolist(), strict=True))


@pytest.mark.parametrize("kind", FORMATS)
def test_targets_and_positions_of_documents(kind: str, tmp_path: Path, cache: Path) -> None:
    """The windows are abcd, efgh, ijkl: documents begin at a, f and h. The ones of one letter or none are left out."""
    pattern = write(tmp_path / "data", kind, ["abcde", "x", "", "fg", "hijklm"])
    corpus = Corpus(train(pattern, batch=3, format=kind, packing="Documents"), context=3, vocabulary=256, cache=cache)
    assert sorted(rows(corpus.samples(0, 0, 3))) == [
        (ordinals("abc"), ordinals("bcd"), [0, 1, 2]),
        (ordinals("efg"), [X, ord("g"), X], [0, 0, 1]),
        (ordinals("ijk"), ordinals("jkl"), [0, 1, 2]),
    ]
    assert corpus.targets_in(0) == 7


@pytest.mark.parametrize("kind", FORMATS)
def test_a_stream_has_all_documents_one_after_another(kind: str, tmp_path: Path, cache: Path) -> None:
    pattern = write(tmp_path / "data", kind, ["abcde", "x", "", "fg", "hijkl"])
    corpus = Corpus(train(pattern, batch=3, format=kind), context=3, vocabulary=256, cache=cache)
    batch = corpus.samples(0, 0, 3)
    assert batch.positions is None
    assert sorted(batch.tokens.tolist()) == [ordinals(text) for text in ("abc", "exf", "hij")]
    assert sorted(batch.targets.tolist()) == [ordinals(text) for text in ("bcd", "ijk", "xfg")]


def test_documents_of_two_tokens_leave_every_sample_a_target(tmp_path: Path) -> None:
    pattern = write(tmp_path / "data", "Text", ["ab", "cd", "ef"])
    corpus = Corpus(train(pattern, batch=2, packing="Documents"), context=2, vocabulary=256)
    assert sorted(rows(corpus.samples(0, 0, 2))) == [
        (ordinals("ab"), [ord("b"), X], [0, 1]),
        (ordinals("de"), [X, ord("f")], [0, 0]),
    ]


def test_samples_are_those_of_their_documents(tmp_path: Path) -> None:
    """For documents of many lengths, against the definition: token by token."""
    lengths = random.Random(1).choices([0, 1, 2, 3, 5, 8, 40], k=300)
    letters = iter(chr(48 + number % 70) for number in range(sum(lengths)))
    documents = ["".join(next(letters) for _ in range(length)) for length in lengths]
    pattern = write(tmp_path / "data", "Text", documents)
    context, size = 12, 16
    corpus = Corpus(
        train(pattern, batch=size, packing="Documents", validationPercent=20), context=context, vocabulary=256
    )
    kept = [document for document in documents if len(document) > 1]
    starts = {0, *accumulate(map(len, kept))}
    stream = "".join(kept)
    expected = []
    for first in range(0, len(stream) - context, context + 1):
        places = range(first, first + context)
        targets = [X if place + 1 in starts else ord(stream[place + 1]) for place in places]
        positions: list[int] = []
        for place in places:
            positions.append(0 if place in starts or not positions else positions[-1] + 1)
        expected.append((ordinals(stream[first : first + context]), targets, positions))
        assert set(targets) != {X}

    seen = rows(corpus.validation(0, corpus.validation_samples))
    for step in range(corpus.training_samples // size + 1):
        batch = corpus.samples(step, 0, size)
        assert corpus.targets_in(step) == int((batch.targets != X).sum())
        seen += rows(batch)
    assert sorted(seen[: len(expected)]) == sorted(expected)


def test_a_context_of_one_token_is_refused(tmp_path: Path) -> None:
    pattern = write(tmp_path / "data", "Text", ["ab", "cd", "ef"])
    with pytest.raises(
        ConfigurationError, match=r"spec\.train\.data\.packing: a sample of context 1 .*allowed: Stream"
    ):
        Corpus(train(pattern, batch=1, packing="Documents"), context=1, vocabulary=256)


def test_documents_of_one_token_are_no_text(tmp_path: Path) -> None:
    pattern = write(tmp_path / "data", "Text", ["a"] * 20)
    with pytest.raises(ConfigurationError, match="0 tokens in 0 documents, where those of fewer than 2 tokens do not"):
        Corpus(train(pattern, packing="Documents"), context=3, vocabulary=256)
