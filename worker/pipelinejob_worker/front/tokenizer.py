"""Text to tokens and back, without transformers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.front.settings import Settings

_FILE_LIMIT_BYTES = 256 << 20


class Tokenizer:
    """A tokenizer of Hugging Face with what its directory says of special tokens.

    ``special_tokens``: the text of each named one, for instance of ``bos_token``. ``end_token_ids``: those that end
    an answer. ``chat_template``: source of the template in Jinja, or None.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        special_tokens: dict[str, str] | None = None,
        end_token_ids: Sequence[int] = (),
        chat_template: str | None = None,
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.special_tokens = special_tokens or {}
        self.end_token_ids = list(end_token_ids)
        self.chat_template = chat_template
        self._byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        self._added = tokenizer.get_added_tokens_decoder()

    def encode(self, text: str, special: bool) -> list[int]:
        """Return the tokens of a text; with ``special``, those that begin and end a document as well."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, without special ones; U+FFFD for bytes that are no text."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for, special ones included; empty for an unknown id."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._added:
            return str(self._added[token_id].content).encode()
        if self._byte_level and all(character in _BYTES for character in token):
            return bytes(_BYTES[character] for character in token)
        if len(token) == len("<0xFF>") and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return str(token).replace("\u2581", " ").encode()


def load(settings: Settings) -> Tokenizer:
    """Load the tokenizer that the settings name. Raises ConfigurationError that names the file."""
    if settings.tokenizer == "Bytes":
        return Tokenizer(_of_bytes())
    directory = settings.tokenizer_directory
    path = directory / "tokenizer.json"
    try:
        tokenizer = tokenizers.Tokenizer.from_str(_read(path))
    except ConfigurationError:
        raise
    except Exception as error:  # the library raises nothing more precise
        raise _unusable(path, f"it is no tokenizer: {error}") from error
    config = _object(directory / "tokenizer_config.json")
    special = _special_tokens(config)
    return Tokenizer(tokenizer, special, _end_token_ids(directory, tokenizer, special), _template(directory, config))


def _of_bytes() -> tokenizers.Tokenizer:
    """Each byte of the UTF-8 text is the token of that number, as in training with the tokenizer Bytes."""
    tokenizer = tokenizers.Tokenizer(models.BPE(_BYTES, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_characters() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies: visible ones of Latin-1 for themselves, the
    others, in order, from U+0100 on (GPT-2, Radford et al. 2019).
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_BYTES = _byte_characters()


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    named = {name: value for name, value in config.items() if name.endswith("_token")}
    extra = config.get("extra_special_tokens")
    texts = {
        name: _token_text(value) for name, value in {**named, **(extra if isinstance(extra, dict) else {})}.items()
    }
    return {name: text for name, text in texts.items() if text is not None}


def _token_text(value: object) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _end_token_ids(directory: Path, tokenizer: tokenizers.Tokenizer, special: dict[str, str]) -> list[int]:
    """A model for chat often ends with a token that is not ``eos_token``: generation_config.json names them all."""
    found = _object(directory / "generation_config.json").get("eos_token_id")
    ids = {value for value in (found if isinstance(found, list) else [found]) if isinstance(value, int)}
    if (own := tokenizer.token_to_id(special.get("eos_token", ""))) is not None:
        ids.add(own)
    return sorted(ids)


def _template(directory: Path, config: dict[str, Any]) -> str | None:
    """Return the template of its own file, else that of the configuration: one, or several of which ``default``."""
    path = directory / "chat_template.jinja"
    if path.exists():
        return _read(path)
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(_read(path))
    except ValueError as error:
        raise _unusable(path, f"it is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise _unusable(path, "it is no JSON object")
    return value


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _FILE_LIMIT_BYTES:
            raise _unusable(path, f"it is larger than {_FILE_LIMIT_BYTES} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _unusable(path, f"it cannot be read: {error}") from error


def _unusable(path: Path, problem: str) -> ConfigurationError:
    return ConfigurationError(
        f"serve: {path} cannot be used: {problem}; allowed: what transformers' save_pretrained writes; save it again"
    )
