"""Documents on disk in every format, and a corpus over them."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from pipelinejob_worker.data import Batch, Corpus
from pipelinejob_worker.protocol import Train

FORMATS = ("Text", "JsonLines", "Tokens", "Dataset")


def train(*patterns: str, batch: int = 4, seed: int = 0, **data: Any) -> Train:
    """The training of a job with ``data`` beside the patterns."""
    return Train.model_validate(
        {"data": {"files": patterns, **data}, "steps": 1, "globalBatchSize": batch, "microbatches": 1, "seed": seed}
    )


def write(directory: Path, kind: str, documents: Sequence[str]) -> str:
    """Write the documents in the format ``kind``; return the pattern that finds them."""
    directory.mkdir(exist_ok=True)
    match kind:
        case "Text":
            for number, document in enumerate(documents):
                (directory / f"{number:06}.txt").write_text(document)
            return f"{directory}/*.txt"
        case "Tokens":
            for number, document in enumerate(documents):
                np.save(directory / f"{number:06}.npy", np.frombuffer(document.encode(), np.uint8).astype(np.uint16))
            return f"{directory}/*.npy"
        case "JsonLines":
            half = len(documents) // 2
            for name, part in (("a", documents[:half]), ("b", documents[half:])):
                lines = "".join(json.dumps({"id": 1, "text": document}) + "\n" for document in part)
                (directory / f"{name}.jsonl").write_text(lines)
            return f"{directory}/*.jsonl"
        case _:
            import datasets  # slow, and most tests need none

            datasets.disable_progress_bars()
            dataset = datasets.Dataset.from_dict({"id": [1] * len(documents), "text": documents})
            dataset.save_to_disk(directory / "set", num_shards=2)
            return f"{directory}/set"


def bpe(directory: Path, size: int = 300) -> tokenizers.Tokenizer:
    """Make a tokenizer of ``size`` ids, that puts <s> before a document, and save it with its eos_token </s>."""
    directory.mkdir(exist_ok=True)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ["the stages of a pipeline pass a hidden state on, the last one computes the loss of the step\n"] * 10,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    return tokenizer


def epoch(corpus: Corpus, batch: int, number: int = 0) -> list[list[int]]:
    """All windows of an epoch, in its order: tokens and the last target. The batch must divide the epoch."""
    steps, rest = divmod(corpus.training_samples, batch)
    assert rest == 0
    return joined(corpus.samples(step, 0, batch) for step in range(number * steps, (number + 1) * steps))


def joined(batches: Iterable[Batch]) -> list[list[int]]:
    """The windows of stream batches."""
    found = list(batches)
    for batch in found:
        assert batch.positions is None
        assert batch.tokens.dtype == batch.targets.dtype == torch.int64
        assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    return torch.cat([torch.cat([batch.tokens, batch.targets[:, -1:]], dim=1) for batch in found]).tolist()
