"""The data of a job: which tokens a sample holds, as a pure function of the seed and the step."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipelinejob_worker.data.opening import open_tokens
from pipelinejob_worker.data.order import Order
from pipelinejob_worker.data.packing import Batch, documents_batch, documents_targets, stream_batch
from pipelinejob_worker.data.refusal import refusal
from pipelinejob_worker.data.tokens import Ids, TokenStream
from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.protocol import SCRATCH_DIRECTORY, Train
from pipelinejob_worker.protocol.train import Data

CACHE_DIRECTORY = Path(SCRATCH_DIRECTORY) / "pipelinejob-tokens"
"""Where text that had to be tokenised is kept, unless another directory is given."""


class Corpus:
    """All documents as one long stream of tokens, cut into windows of ``context + 1``; each window is a sample.

    A step's batch is a range of the endless sequence of epochs, each of which has every training window once.
    """

    def __init__(
        self, train: Train, context: int, vocabulary: int, model_directory: str = "", cache: Path = CACHE_DIRECTORY
    ) -> None:
        """Find the files and tokenise what is not tokens yet.

        ``vocabulary``: number of token ids that the model knows. ``model_directory``: where a model of Hugging Face
        lies, for its tokenizer. ``cache``: directory for tokenised text, shared by all processes that may write it.
        Raises ConfigurationError when data, tokenizer and model do not fit each other, or for too little text.
        """
        data = train.data
        self._context = context
        self._batch = train.global_batch_size
        self._documents = data.packing == "Documents"
        tokens = open_tokens(data, vocabulary, model_directory, cache)
        self._stream = TokenStream(tokens.files, vocabulary)
        self._ends = tokens.ends
        self._order = Order(self._stream.tokens // (context + 1), data.validation_percent, train.seed)
        self._check_context()
        self._check_size()
        self._check_validation(data.validation_percent)
        self.training_samples = self._order.training
        """Samples of an epoch."""
        self.validation_samples = self._order.validation
        """Samples that are never trained on."""
        self.fingerprint = _fingerprint(tokens.identity, data)
        """Of what determines the samples, below 2**56: two stages that see other data have another one."""

    def samples(self, step: int, first: int, count: int) -> Batch:
        """Return samples ``first`` to ``first + count`` of the global batch of ``step``, which counts from 0.

        Raises ConfigurationError when a file has become shorter or has ids that the model does not know, OSError
        when it cannot be read any more.
        """
        return self._read(self._training_firsts(step, first, count))

    def validation(self, first: int, count: int) -> Batch:
        """Return validation samples ``first`` to ``first + count``; raises as ``samples`` does."""
        return self._read(self._firsts([self._order.validation_window(first + index) for index in range(count)]))

    def targets_in(self, step: int) -> int:
        """Return how many tokens of the global batch of ``step`` have a loss; reads no file."""
        if not self._documents:
            return self._batch * self._context
        return documents_targets(self._training_firsts(step, 0, self._batch), self._context, self._ends)

    def _training_firsts(self, step: int, first: int, count: int) -> Ids:
        position = step * self._batch + first
        return self._firsts([self._order.training_window(position + index) for index in range(count)])

    def _firsts(self, windows: Sequence[int]) -> Ids:
        return np.array(windows, np.int64) * (self._context + 1)

    def _read(self, firsts: Ids) -> Batch:
        windows = np.empty((len(firsts), self._context + 1), np.int64)
        for sample, first in enumerate(firsts):
            windows[sample] = self._stream.read(int(first), self._context + 1)
        return documents_batch(windows, firsts, self._ends) if self._documents else stream_batch(windows)

    def _check_context(self) -> None:
        if self._documents and self._context < 2:
            raise refusal(
                "packing",
                f"a sample of context {self._context} may be the end of one document and the start of the next",
                "Stream, or a context of 2 or more with Documents",
                "set one of the two",
            )

    def _check_size(self) -> None:
        if self._order.training < self._batch:
            left_out = ", where those of fewer than 2 tokens do not count," if self._documents else ""
            split = f" and {self._order.validation} for validation" if self._order.validation else ""
            raise refusal(
                "files",
                f"{self._stream.tokens} tokens in {len(self._ends)} documents{left_out} make "
                f"{self._order.training} samples of context {self._context}{split}",
                f"at least globalBatchSize {self._batch}",
                "add text or lower one of the two",
            )

    def _check_validation(self, percent: int) -> None:
        if 0 < self._order.validation < self._batch:
            raise refusal(
                "validationPercent",
                f"{percent} % of the {self._order.training + self._order.validation} samples are "
                f"{self._order.validation}, and validation takes a whole batch at a time",
                f"at least globalBatchSize {self._batch} of them, or 0 for no validation",
                "raise it, add text or lower globalBatchSize",
            )


def _fingerprint(identity: str, data: Data) -> int:
    # What is at its default adds nothing, so that a job keeps its fingerprint when settings are added to the API.
    settings = data.model_dump_json(exclude_defaults=True, exclude={"files"})
    text = identity if settings == "{}" else f"{identity}\n{settings}"
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogateescape")).digest()[:7], "big")


def check_same_data(fingerprints: Sequence[int]) -> None:
    """Raise ConfigurationError unless all stages that read data, those with a fingerprint other than 0, read the same.

    The fingerprints are in the order of the ranks.
    """
    readers = [(rank, fingerprint) for rank, fingerprint in enumerate(fingerprints) if fingerprint]
    for rank, fingerprint in readers:
        if fingerprint != readers[0][1]:
            raise ConfigurationError(
                f"spec.train.data.files: rank {readers[0][0]} and rank {rank} see different files, sizes or text; "
                "allowed: the same files in every stage's container; use one image and a volume that all stages share"
            )
