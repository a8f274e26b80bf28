"""What a training loop reads from."""

from typing import Protocol

from pipelinejob_worker.data.packing import Batch


class Source(Protocol):
    """Samples as a function of the step; ``Corpus`` is the one that reads files."""

    validation_samples: int
    """Samples that are never trained on."""

    def samples(self, step: int, first: int, count: int) -> Batch:
        """Return samples ``first`` to ``first + count`` of the global batch of ``step``, which counts from 0."""

    def validation(self, first: int, count: int) -> Batch:
        """Return validation samples ``first`` to ``first + count``."""

    def targets_in(self, step: int) -> int:
        """Return how many tokens of the global batch of ``step`` have a loss."""
