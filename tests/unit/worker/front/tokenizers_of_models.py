"""Directories with tokenizers as models have them, written by transformers."""

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

_TEXTS = ["Hello world, how are you?", "Grüße an die Welt", "The end of the story."] * 3

TEMPLATE = """{%- for message in messages %}
{%- if loop.first and message.role != 'system' %}{{ '<|system|>Be brief.<|end|>' }}{% endif %}
{{ '<|' + message.role + '|>' }}{% generation %}{{ message.content | trim }}{% endgeneration %}<|end|>
{%- endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""

SPECIAL = ["<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def byte_level() -> tokenizers.Tokenizer:
    """As GPT-2, Llama 3 and Qwen have it."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """As Llama 2, Mistral and Gemma have it: bytes only for unknown characters, a space before the first word."""
    pieces = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyzü.,H"]
    merges = [("▁", "h"), ("▁h", "i"), ("l", "l")]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, *("".join(pair) for pair in merges)])}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def save(tokenizer: tokenizers.Tokenizer, directory: Path, template: str | None = TEMPLATE) -> Any:
    """Write the files of a model's directory, and return the tokenizer as transformers has it."""
    from transformers import PreTrainedTokenizerFast

    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        extra_special_tokens={"user_token": "<|user|>"},
        chat_template=template,
    )
    found.save_pretrained(directory)
    return found
