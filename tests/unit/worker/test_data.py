"""Every sample once an epoch, in an order that depends on the seed and the step alone."""

import os
import tempfile
from pathlib import Path

import pytest
import torch

from pipelinejob_worker.data import Corpus, check_same_data
from pipelinejob_worker.data.order import Order, permuted
from pipelinejob_worker.errors import ConfigurationError
from tests.unit.worker.corpora import epoch, joined, train

TEXT = bytes(range(250))


def two_files(directory: Path) -> str:
    (directory / "b.txt").write_bytes(TEXT[103:])  # windows of 10 bytes cross from one file to the next
    (directory / "a.txt").write_bytes(TEXT[:103])
    return f"{directory}/*.txt"


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
    pattern = two_files(tmp_path)
    (tmp_path / "ignored.bin").write_bytes(b"x" * 1000)
    corpus = Corpus(train(pattern, f"{tmp_path}/a*", batch=5), context=9, vocabulary=256)
    assert corpus.training_samples == 25
    windows = epoch(corpus, 5)
    assert sorted(windows) == [list(range(start, start + 10)) for start in range(0, 250, 10)]
    assert windows != sorted(windows)
    assert sorted(windows) == sorted(epoch(corpus, 5, number=1))
    assert windows != epoch(corpus, 5, number=1)


def test_samples_and_fingerprint_are_those_of_the_first_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job of the first release goes on with the samples that it has not seen yet."""
    two_files(tmp_path)
    monkeypatch.chdir(tmp_path)  # paths are a part of the fingerprint
    corpus = Corpus(train("*.txt", batch=5, seed=7), context=9, vocabulary=256)
    assert corpus.fingerprint == 21777663735791525
    assert [corpus.samples(step, 0, 5).tokens[:, 0].tolist() for step in range(7)] == [
        [30, 180, 150, 80, 60],
        [240, 50, 40, 220, 90],
        [200, 10, 20, 170, 110],
        [120, 0, 230, 100, 210],
        [130, 190, 160, 70, 140],
        [20, 30, 130, 120, 50],
        [150, 160, 180, 230, 190],
    ]


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
@pytest.mark.parametrize("percent", [0, 40])
def test_samples_do_not_depend_on_how_a_batch_is_cut(tmp_path: Path, parts: int, percent: int) -> None:
    """However many microbatches and pipelines share a step, and also where an epoch ends within it."""
    corpus = Corpus(train(two_files(tmp_path), batch=8, validationPercent=percent), context=9, vocabulary=256)
    size = 8 // parts
    for step in (0, 2, 3, 7):
        whole = corpus.samples(step, 0, 8)
        cut = [corpus.samples(step, first, size) for first in range(0, 8, size)]
        assert torch.equal(torch.cat([batch.tokens for batch in cut]), whole.tokens)
        assert torch.equal(torch.cat([batch.targets for batch in cut]), whole.targets)


def test_all_tokens_of_a_stream_have_a_loss(tmp_path: Path) -> None:
    corpus = Corpus(train(two_files(tmp_path), batch=5), context=9, vocabulary=256)
    assert corpus.targets_in(3) == 45


class TestValidation:
    """validationPercent of the windows are for validation, and never trained on."""

    @pytest.mark.parametrize(
        ("windows", "percent", "expected"),
        [(25, 0, 0), (25, 1, 1), (25, 10, 2), (25, 50, 12), (1000, 1, 10), (1, 50, 1), (0, 50, 0)],
    )
    def test_their_number_is_exact(self, windows: int, percent: int, expected: int) -> None:
        order = Order(windows, percent, seed=0)
        assert order.validation == expected
        assert order.training == windows - expected

    @pytest.mark.parametrize("percent", [1, 10, 40])
    def test_training_and_validation_share_no_window_and_leave_none_out(self, percent: int) -> None:
        order = Order(200, percent, seed=3)
        validation = {order.validation_window(index) for index in range(order.validation)}
        assert len(validation) == 2 * percent
        for number in range(3):
            first = number * order.training
            seen = [order.training_window(position) for position in range(first, first + order.training)]
            assert sorted([*seen, *validation]) == list(range(200))

    def test_they_depend_on_the_seed_alone(self, tmp_path: Path) -> None:
        pattern = two_files(tmp_path)

        def validation(seed: int, batch: int) -> list[list[int]]:
            corpus = Corpus(train(pattern, batch=batch, seed=seed, validationPercent=20), context=9, vocabulary=256)
            assert (corpus.training_samples, corpus.validation_samples) == (20, 5)
            whole = joined([corpus.validation(0, 5)])
            assert whole == joined([corpus.validation(0, 2), corpus.validation(2, 3)])
            assert sorted(whole + epoch(corpus, batch, number=4)) == [
                list(range(start, start + 10)) for start in range(0, 250, 10)
            ]
            return whole

        assert validation(seed=0, batch=5) == validation(seed=0, batch=1)
        assert sorted(validation(seed=0, batch=5)) != sorted(validation(seed=1, batch=5))

    def test_without_a_percentage_there_is_none_and_the_order_is_the_same(self) -> None:
        order = Order(100, 0, seed=5)
        assert [order.training_window(position) for position in range(300)] == [
            permuted(position % 100, 100, 5, position // 100) for position in range(300)
        ]

    def test_they_fill_a_batch(self, tmp_path: Path) -> None:
        message = r"data\.validationPercent: 20 % of the 25 samples are 5, .*; allowed: at least globalBatchSize 8 of"
        with pytest.raises(ConfigurationError, match=message):
            Corpus(train(two_files(tmp_path), batch=8, validationPercent=20), context=9, vocabulary=256)

    def test_they_leave_enough_to_train_on(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match="make 15 samples of context 9 and 10 for validation; allowed: at"):
            Corpus(train(two_files(tmp_path), batch=16, validationPercent=40), context=9, vocabulary=256)


class TestRefusals:
    """What can never work is refused in one line that names the cure."""

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(
            ConfigurationError, match=r"spec\.train\.data\.files: no file matches .*; correct the pattern"
        ):
            Corpus(train(f"{tmp_path}/*.txt"), context=3, vocabulary=256)

    def test_a_directory_is_no_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").mkdir()
        with pytest.raises(ConfigurationError, match="no file matches"):
            Corpus(train(f"{tmp_path}/*.txt"), context=3, vocabulary=256)

    @pytest.mark.parametrize("content", [b"", b"x" * 15])
    def test_too_little_text(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "short.txt").write_bytes(content)
        message = rf"{len(content)} tokens in 1 documents make {len(content) // 4} samples of context 3; allowed: at "
        with pytest.raises(ConfigurationError, match=message + "least globalBatchSize 4; add text"):
            Corpus(train(f"{tmp_path}/*.txt"), context=3, vocabulary=256)

    def test_a_file_that_shrinks(self, tmp_path: Path) -> None:
        file = tmp_path / "a.txt"
        file.write_bytes(b"x" * 100)
        corpus = Corpus(train(str(file)), context=3, vocabulary=256)
        file.write_bytes(b"x")
        with pytest.raises(ConfigurationError, match=r"a\.txt has become shorter"):
            corpus.samples(0, 0, 4)

    def test_a_file_that_the_user_may_not_read(self) -> None:
        user = os.geteuid()
        with tempfile.TemporaryDirectory() as directory:
            Path(directory).chmod(0o755)
            file = Path(directory) / "secret.txt"
            file.write_bytes(b"x" * 100)
            file.chmod(0)
            os.seteuid(user or 65534)
            try:
                with pytest.raises(ConfigurationError, match=r"secret\.txt cannot be read: Permission denied; allowed"):
                    Corpus(train(str(file)), context=3, vocabulary=256)
            finally:
                os.seteuid(user)

    def test_bytes_for_a_model_with_fewer_tokens(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"x" * 100)
        with pytest.raises(ConfigurationError, match=r"spec\.train\.data\.tokenizer: Bytes has 256 .* knows 255; "):
            Corpus(train(f"{tmp_path}/*.txt"), context=3, vocabulary=255)

    def test_a_message_is_one_line_of_valid_text(self, tmp_path: Path) -> None:
        file = tmp_path / os.fsdecode(b"a\xff\nb.txt")
        file.write_bytes(b"x" * 100)
        corpus = Corpus(train(f"{tmp_path}/*.txt"), context=3, vocabulary=256)
        file.write_bytes(b"x")
        with pytest.raises(ConfigurationError) as caught:
            corpus.samples(0, 0, 4)
        assert "\n" not in str(caught.value)
        assert r"a\udcff b.txt has become shorter" in str(caught.value).encode().decode()


class TestFingerprint:
    """Stages that would read other samples are found before the first step."""

    def test_other_sizes(self, tmp_path: Path) -> None:
        file = tmp_path / "a.txt"
        file.write_bytes(b"x" * 100)
        before = Corpus(train(str(file)), context=3, vocabulary=256).fingerprint
        file.write_bytes(b"x" * 101)
        after = Corpus(train(str(file)), context=3, vocabulary=256).fingerprint
        check_same_data([before, 0, before])
        check_same_data([0, 0])
        with pytest.raises(ConfigurationError, match="rank 0 and rank 2 see different files"):
            check_same_data([before, 0, after])
        with pytest.raises(ConfigurationError, match="rank 0 and rank 3 see different files"):
            check_same_data([before, before, 0, after, 0, before])

    @pytest.mark.parametrize("setting", [{"validationPercent": 20}, {"packing": "Documents"}])
    def test_other_samples_of_the_same_files(self, tmp_path: Path, setting: dict[str, object]) -> None:
        pattern = two_files(tmp_path)
        plain = Corpus(train(pattern), context=3, vocabulary=256).fingerprint
        other = Corpus(train(pattern, **setting), context=3, vocabulary=256).fingerprint
        assert plain != other
        assert max(plain, other) < 2**56
