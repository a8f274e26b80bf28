"""Tokenizers of Hugging Face: the same ids as the library gives for each whole document, or a refusal."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import processors

from pipelinejob_worker.data import Corpus
from pipelinejob_worker.data.documents import Piece, pieces_of, text_pieces
from pipelinejob_worker.data.tokenizer import HuggingFace
from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.models import IGNORED
from tests.unit.worker.corpora import bpe, epoch, train, write

DOCUMENTS = ["the stages of a pipeline", "naïve 日本語 🙂\n", "", "loss"]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def stream(pattern: str, size: int, cache: Path, vocabulary: int = 300, **data: Any) -> list[int]:
    """All ids of a corpus that is one sample of ``size`` tokens."""
    settings = {"tokenizer": "HuggingFace", **data}
    (found,) = epoch(Corpus(train(pattern, batch=1, **settings), size - 1, vocabulary, cache=cache), 1)
    return found


def encoded(directory: Path, pieces: Sequence[Piece], vocabulary: int = 300) -> list[int]:
    return [id for ids in HuggingFace(directory, vocabulary).encode(pieces) for id in ids.tolist()]


@pytest.mark.parametrize("kind", ["Text", "JsonLines", "Dataset"])
def test_ids_are_those_of_the_library_with_the_end_of_each_document(kind: str, tmp_path: Path, cache: Path) -> None:
    tokenizer = bpe(tmp_path / "tokenizer")
    pattern = write(tmp_path / "data", kind, DOCUMENTS)
    end = tokenizer.token_to_id("</s>")
    expected = [id for document in DOCUMENTS if document for id in [*tokenizer.encode(document).ids, end]]
    found = stream(pattern, len(expected), cache, format=kind, tokenizerPath=str(tmp_path / "tokenizer"))
    assert found == expected
    assert tokenizer.decode(found) == "".join(DOCUMENTS)


def test_documents_begin_and_end_with_their_own_tokens(tmp_path: Path, cache: Path) -> None:
    tokenizer = bpe(tmp_path / "tokenizer")
    begin, end = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
    pattern = write(tmp_path / "data", "JsonLines", DOCUMENTS)
    data = {"format": "JsonLines", "packing": "Documents", "tokenizer": "HuggingFace"}
    path = str(tmp_path / "tokenizer")
    size = sum(len(tokenizer.encode(document).ids) + 1 for document in DOCUMENTS if document)
    corpus = Corpus(train(pattern, batch=1, tokenizerPath=path, **data), size - 1, 300, cache=cache)
    batch = corpus.samples(0, 0, 1)
    assert batch.positions is not None
    assert (batch.tokens == begin).sum() == 3
    assert ((batch.tokens == begin) == (batch.positions == 0)).all()
    assert ((batch.tokens == end) == (batch.targets == IGNORED))[:, :-1].all()
    assert corpus.targets_in(0) == size - 3


def test_the_model_directory_is_the_default(tmp_path: Path, cache: Path) -> None:
    bpe(tmp_path / "model")
    pattern = write(tmp_path / "data", "Text", DOCUMENTS)
    settings = train(pattern, batch=1, tokenizer="HuggingFace")
    own = Corpus(settings, 5, 300, str(tmp_path / "model"), cache)
    named = train(pattern, batch=1, tokenizer="HuggingFace", tokenizerPath=str(tmp_path / "model"))
    assert epoch(own, 1) == epoch(Corpus(named, 5, 300, "", cache), 1)


class TestPieces:
    """A long document is tokenised in pieces, so that memory does not grow with it."""

    SIZE = 200
    LINES = "the stages pass a naïve state on: 日本語\n" * 100

    def test_a_long_document_has_the_ids_of_the_whole(self, tmp_path: Path) -> None:
        tokenizer = bpe(tmp_path / "tokenizer")
        (tmp_path / "long.txt").write_text(self.LINES)
        expected = [*tokenizer.encode(self.LINES).ids, tokenizer.token_to_id("</s>")]
        from_file = list(text_pieces([str(tmp_path / "long.txt")], self.SIZE))
        for pieces in (from_file, list(pieces_of(self.LINES, "here", self.SIZE))):
            assert len(pieces) > 10
            assert max(len(piece.text) for piece in pieces) <= 2 * self.SIZE
            assert encoded(tmp_path / "tokenizer", pieces) == expected
        assert [piece.where for piece in from_file[:3]] == [f"{tmp_path}/long.txt:{line}" for line in (1, 6, 11)]

    def test_a_long_line_is_cut_between_characters(self, tmp_path: Path) -> None:
        tokenizer = bpe(tmp_path / "tokenizer")
        text = "x" + "é" * 1000  # after an even number of bytes there is half a character
        (tmp_path / "long.txt").write_text(text)
        pieces = list(text_pieces([str(tmp_path / "long.txt")], self.SIZE))
        assert [piece.first for piece in pieces] == [True, False, False, False, False, False]
        assert [piece.last for piece in pieces] == [False, False, False, False, False, True]
        assert tokenizer.decode(encoded(tmp_path / "tokenizer", pieces)) == text

    @pytest.mark.parametrize(
        ("content", "line", "byte"),
        [
            (b"fine\n\xff\n", 2, "0xff"),
            (b"fine\n" * 500 + b"caf\xe9 \n", 501, "0xe9"),
            (b"x" * 1000 + b"\n\n\xc3(", 3, "0xc3"),
            (b"fine\ncut \xc3", 2, "0xc3"),
        ],
    )
    def test_text_that_is_no_utf_8_is_refused_with_its_line(
        self, content: bytes, line: int, byte: str, tmp_path: Path
    ) -> None:
        (tmp_path / "a.txt").write_bytes(content)
        message = rf"spec\.train\.data\.files: \S+a\.txt:{line} is no UTF-8: byte {byte}: .*; convert the file"
        with pytest.raises(ConfigurationError, match=message):
            list(text_pieces([str(tmp_path / "a.txt")], self.SIZE))


class TestTokenizerFile:
    """What a tokenizer.json may ask for beside the ids."""

    def test_truncation_padding_and_dropout_do_not_touch_the_text(self, tmp_path: Path) -> None:
        directory = tmp_path / "tokenizer"
        tokenizer = bpe(directory)
        pieces = list(pieces_of("the stages of a pipeline " * 20, "here"))
        expected = encoded(directory, pieces)
        tokenizer.enable_truncation(4)
        tokenizer.enable_padding(length=4096)
        tokenizer.model.dropout = 0.5
        tokenizer.save(str(directory / "tokenizer.json"))
        assert encoded(directory, pieces) == expected

    @pytest.mark.parametrize(
        ("template", "end", "expected"),
        [
            ("$A", None, ["loss"]),
            ("$A", "</s>", ["loss", "</s>"]),
            ("<s> $A </s>", "</s>", ["<s>", "loss", "</s>"]),
            ("<s> <s> $A </s>", "<s>", ["<s>", "<s>", "loss", "</s>", "<s>"]),
        ],
    )
    def test_a_document_ends_once(self, template: str, end: str | None, expected: list[str], tmp_path: Path) -> None:
        tokenizer = bpe(tmp_path / "tokenizer")
        specials = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
        tokenizer.save(str(tmp_path / "tokenizer/tokenizer.json"))
        (tmp_path / "tokenizer/tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
        ids = encoded(tmp_path / "tokenizer", list(pieces_of("loss", "here")))
        whole = [token for name in expected for token in tokenizer.encode(name, add_special_tokens=False).tokens]
        assert [tokenizer.id_to_token(id) for id in ids] == whole

    def test_a_directory_that_transformers_saved_is_read(self, tmp_path: Path) -> None:
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=bpe(tmp_path / "raw"), bos_token="<s>", eos_token="</s>"
        )
        fast.save_pretrained(tmp_path / "saved")
        expected = [*fast("loss of a stage")["input_ids"], fast.eos_token_id]
        assert encoded(tmp_path / "saved", list(pieces_of("loss of a stage", "here"))) == expected


class TestVocabulary:
    """A tokenizer with ids that the model does not know."""

    def test_it_is_refused_before_any_text_is_read(self, tmp_path: Path) -> None:
        bpe(tmp_path / "tokenizer", 300)
        HuggingFace(tmp_path / "tokenizer", 300)
        message = (
            r"spec\.train\.data\.tokenizerPath: \S+tokenizer\.json does not fit the model: it has ids up to 299; "
            "allowed: ids up to 298, .*; use the model's own tokenizer"
        )
        with pytest.raises(ConfigurationError, match=message):
            HuggingFace(tmp_path / "tokenizer", 299)

    def test_an_added_token_is_refused_only_where_the_text_has_it(self, tmp_path: Path) -> None:
        tokenizer = bpe(tmp_path / "tokenizer", 300)
        tokenizer.add_special_tokens(["<image>"])
        tokenizer.save(str(tmp_path / "tokenizer/tokenizer.json"))
        encoded(tmp_path / "tokenizer", list(pieces_of("loss", "a.jsonl:7")))
        with pytest.raises(
            ConfigurationError, match=r"in a\.jsonl:7 it gives token '<image>' the id 300; allowed: ids"
        ):
            encoded(tmp_path / "tokenizer", list(pieces_of("an <image>", "a.jsonl:7")))


def without(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()


def spoiled(name: str, content: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text(content)


class TestRefusals:
    """A directory that is no tokenizer's."""

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (
                without,
                r"there is no file \S+tokenizer\.json; allowed: a directory with .*; make it with save_pretrained",
            ),
            (spoiled("tokenizer.json", "{"), r"\S+tokenizer\.json is no tokenizer: EOF while .*; allowed: a file that"),
            (spoiled("tokenizer.json", "{}"), r"\S+tokenizer\.json is no tokenizer: "),
            (spoiled("tokenizer_config.json", "{"), r"\S+tokenizer_config\.json is no JSON object"),
            (spoiled("tokenizer_config.json", "[]"), r"\S+tokenizer_config\.json is no JSON object"),
            (spoiled("tokenizer_config.json", '{"eos_token": "<end>"}'), r"\S+ names eos_token '<end>', which tok"),
            (spoiled("tokenizer_config.json", '{"eos_token": 3}'), r"\S+ names eos_token '3', which tokenizer\.json"),
        ],
    )
    def test_a_damaged_directory(self, damage: Callable[[Path], object], message: str, tmp_path: Path) -> None:
        bpe(tmp_path / "tokenizer")
        damage(tmp_path / "tokenizer")
        with pytest.raises(ConfigurationError, match=rf"spec\.train\.data\.tokenizerPath: {message}") as caught:
            HuggingFace(tmp_path / "tokenizer", 300)
        assert "\n" not in str(caught.value)

    def test_no_directory(self, tmp_path: Path) -> None:
        pattern = write(tmp_path / "data", "Text", DOCUMENTS)
        with pytest.raises(ConfigurationError, match=r"tokenizerPath: it is empty, and the model has no directory"):
            Corpus(train(pattern, tokenizer="HuggingFace"), 3, 300)
