"""Every sample once an epoch, in an order that depends on the seed and the step alone."""

from pathlib import Path

import pytest
import torch

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.protocol import Train
from pipelinejob_worker.train.data import Corpus, check_same_data, inputs_of, permuted, targets_of


def train(*patterns: str, batch: int = 4, seed: int = 0) -> Train:
    return Train.model_validate(
        {"data": {"files": patterns}, "steps": 1, "globalBatchSize": batch, "microbatches": 1, "seed": seed}
    )


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000])
def test_the_order_is_a_permutation_that_changes_with_seed_and_epoch(size: int) -> None:
    orders = [
        [permuted(position, size, seed, epoch) for position in range(size)] for seed, epoch in [(0, 0), (0, 1), (1, 0)]
    ]
    assert all(sorted(order) == list(range(size)) for order in orders)
    if size > 10:
        assert len({tuple(order) for order in orders}) == 3
        assert list(range(size)) not in orders


def test_an_epoch_has_every_window_of_all_files_once(tmp_path: Path) -> None:
    text = bytes(range(250))
    (tmp_path / "b.txt").write_bytes(text[103:])  # windows of 10 bytes cross from one file to the next
    (tmp_path / "a.txt").write_bytes(text[:103])
    (tmp_path / "ignored.bin").write_bytes(b"x" * 1000)
    corpus = Corpus(train(f"{tmp_path}/*.txt", f"{tmp_path}/a*", batch=5), context=9)
    assert corpus.windows == 25
    samples = torch.cat([corpus.samples(step, 0, 5) for step in range(5)])
    assert samples.dtype == torch.int64
    assert sorted(samples.tolist()) == [list(range(start, start + 10)) for start in range(0, 250, 10)]
    assert samples.tolist() != sorted(samples.tolist())


def test_a_sample_does_not_depend_on_how_a_batch_is_cut(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(200)))
    corpus = Corpus(train(f"{tmp_path}/a.txt", batch=8), context=3)
    parts = torch.cat([corpus.samples(7, first, 2) for first in range(0, 8, 2)])
    assert torch.equal(parts, corpus.samples(7, 0, 8))


def test_targets_are_the_next_tokens(tmp_path: Path) -> None:
    samples = torch.tensor([[1, 2, 3, 4]])
    assert inputs_of(samples).tolist() == [[1, 2, 3]]
    assert targets_of(samples).tolist() == [[2, 3, 4]]


def test_no_file_and_too_little_text_are_refused_with_a_cure(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"spec\.train\.data\.files: no file matches .*correct the pattern"):
        Corpus(train(f"{tmp_path}/*.txt"), context=3)
    (tmp_path / "short.txt").write_bytes(b"x" * 15)
    with pytest.raises(ConfigurationError, match="15 bytes in 1 files make 3 samples of context 3; allowed: at least"):
        Corpus(train(f"{tmp_path}/*.txt"), context=3)


def test_a_file_that_shrinks_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"x" * 100)
    corpus = Corpus(train(str(file)), context=3)
    file.write_bytes(b"x")
    with pytest.raises(ConfigurationError, match=r"a\.txt has become shorter"):
        corpus.samples(0, 0, 4)


def test_a_directory_that_matches_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(ConfigurationError, match="no file matches"):
        Corpus(train(f"{tmp_path}/*.txt"), context=3)


def test_other_files_or_sizes_have_another_fingerprint(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"x" * 100)
    before = Corpus(train(str(file)), context=3).fingerprint
    file.write_bytes(b"x" * 101)
    after = Corpus(train(str(file)), context=3).fingerprint
    check_same_data([before, 0, before])
    with pytest.raises(ConfigurationError, match="stage 0 and stage 2 see different files"):
        check_same_data([before, 0, after])
