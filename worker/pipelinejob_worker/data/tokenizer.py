"""Text to token ids: by bytes, or with a tokenizer of Hugging Face."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers

from pipelinejob_worker.data.documents import Piece
from pipelinejob_worker.data.refusal import refusal, unreadable
from pipelinejob_worker.data.tokens import Ids
from pipelinejob_worker.protocol.train import Data


class Tokenizer(ABC):
    """Makes token ids below ``vocabulary`` of pieces of documents."""

    identity: str
    """What determines the ids; equal for equal tokenizers."""

    @abstractmethod
    def encode(self, pieces: Sequence[Piece]) -> list[Ids]:
        """Return the ids of each piece; those of a document's pieces, joined, are the document.

        Raises ConfigurationError for an id that the model does not know.
        """


def tokenizer_of(data: Data, vocabulary: int, model_directory: str) -> Tokenizer:
    """Return the tokenizer that ``data`` names.

    Raises ConfigurationError when there is none, or when it has more ids than the model.
    """
    if data.tokenizer == "Bytes":
        return Bytes(vocabulary)
    if not (data.tokenizer_path or model_directory):
        raise refusal(
            "tokenizerPath",
            "it is empty, and the model has no directory with a tokenizer",
            "a directory with tokenizer.json in the worker container",
            "set it, or use tokenizer Bytes",
        )
    return HuggingFace(Path(data.tokenizer_path or model_directory), vocabulary)


class Bytes(Tokenizer):
    """Each byte of the UTF-8 text is a token."""

    identity = "Bytes"
    size = 256
    """Number of ids."""

    def __init__(self, vocabulary: int) -> None:
        if vocabulary < self.size:
            raise refusal(
                "tokenizer",
                f"Bytes has {self.size} tokens, the model knows {vocabulary}",
                "a tokenizer whose ids the model knows",
                "use HuggingFace with the model's own tokenizer, or a model with a larger vocabulary",
            )

    def encode(self, pieces: Sequence[Piece]) -> list[Ids]:
        """Return the bytes of each piece."""
        return [np.frombuffer(piece.text.encode(), np.uint8).astype(np.int64) for piece in pieces]


class HuggingFace(Tokenizer):
    """The tokenizer in ``directory``.

    A document is what the tokenizer puts before it (for instance a token for its begin), its text, what the tokenizer
    puts after it, and, if this is not yet its end, the ``eos_token`` of tokenizer_config.json, if there is one: a
    model that never sees the end of a document cannot learn to stop.
    """

    def __init__(self, directory: Path, vocabulary: int) -> None:
        self._path = directory / "tokenizer.json"
        content = _read(self._path)
        self._tokenizer = _load(content, self._path)
        self._vocabulary = vocabulary
        self._check_vocabulary()
        alone = self._tokenizer.encode("a")
        text = [place for place, special in enumerate(alone.special_tokens_mask) if not special] or [len(alone.ids)]
        self._before, self._after = alone.ids[: text[0]], alone.ids[text[-1] + 1 :]
        end = self._end_of_document(directory / "tokenizer_config.json")
        if end is not None and self._after[-1:] != [end]:
            self._after.append(end)
        frame = json.dumps([self._before, self._after])
        self.identity = f"{hashlib.sha256(content).hexdigest()} {tokenizers.__version__} {frame}"

    def encode(self, pieces: Sequence[Piece]) -> list[Ids]:
        """Return the ids of each piece, with what begins and ends a document."""
        encoded = self._tokenizer.encode_batch_fast([piece.text for piece in pieces], add_special_tokens=False)
        return [self._framed(piece, encoding.ids) for piece, encoding in zip(pieces, encoded, strict=True)]

    def _framed(self, piece: Piece, ids: list[int]) -> Ids:
        found = np.array((self._before if piece.first else []) + ids + (self._after if piece.last else []), np.int64)
        wrong = found[found >= self._vocabulary]
        if wrong.size:
            token = self._tokenizer.id_to_token(int(wrong[0]))
            raise self._too_large(f"in {piece.where} it gives token {token!r} the id {wrong[0]}")
        return found

    def _check_vocabulary(self) -> None:
        """Compare without added tokens, which the text need not use: some models know fewer of them."""
        ids = self._tokenizer.get_vocab(with_added_tokens=False).values()
        if ids and max(ids) >= self._vocabulary:
            raise self._too_large(f"it has ids up to {max(ids)}")

    def _too_large(self, problem: str) -> Exception:
        return refusal(
            "tokenizerPath",
            f"{self._path} does not fit the model: {problem}",
            f"ids up to {self._vocabulary - 1}, which the model knows",
            "use the model's own tokenizer, or a model with a larger vocabulary",
        )

    def _end_of_document(self, config: Path) -> int | None:
        if not config.exists():
            return None
        try:
            named = json.loads(_read(config)).get("eos_token")
        except (ValueError, AttributeError) as error:
            raise refusal(
                "tokenizerPath", f"{config} is no JSON object", "the file that transformers saves", "save it again"
            ) from error
        token = named.get("content") if isinstance(named, dict) else named
        if token is None:
            return None
        found: int | None = self._tokenizer.token_to_id(token) if isinstance(token, str) else None
        if found is None:
            raise refusal(
                "tokenizerPath",
                f"{config} names eos_token {str(token)[:64]!r}, which tokenizer.json does not have",
                "one of its tokens, or null",
                "save both files with the same version of the tokenizer",
            )
        return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise refusal(
            "tokenizerPath",
            f"there is no file {path}",
            "a directory with tokenizer.json in the worker container",
            "make it with save_pretrained of transformers' AutoTokenizer, or correct the path",
        ) from error
    except OSError as error:
        raise unreadable(str(path), error) from error


def _load(content: bytes, path: Path) -> tokenizers.Tokenizer:
    """Load a tokenizer as it treats text for training: whole, and always in the same way."""
    try:
        tokenizer = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises nothing more precise
        raise refusal(
            "tokenizerPath",
            f"{path} is no tokenizer: {error}",
            f"a file that version {tokenizers.__version__} of the tokenizers library reads",
            "save it again",
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    return tokenizer
