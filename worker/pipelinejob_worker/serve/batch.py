"""What travels through the stages: batches of tokens with their places in the cache, and what was drawn."""

from dataclasses import dataclass

from pipelinejob_worker.serve.wire import Sampling

BLOCK = 16
"""Tokens of a block of the key-value cache."""


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one request: positions ``start`` to ``start + count - 1``."""

    start: int
    count: int
    blocks: tuple[int, ...]
    """Of the request, in the order of its positions: position n is in ``blocks[n // BLOCK]``, the same on all stages.
    Numbered from 1; block 0 belongs to nobody and holds zeros."""

    sampling: Sampling | None = None
    """How to draw the token behind the last one; None when that token is known."""


@dataclass(frozen=True)
class Batch:
    """What all stages compute in one pass. ``tokens`` are those of all pieces in their order, known to stage 0 only."""

    number: int
    pieces: tuple[Piece, ...]
    tokens: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Number of tokens."""
        return sum(piece.count for piece in self.pieces)

    @property
    def draws(self) -> tuple[Piece, ...]:
        """The pieces behind which a token is drawn."""
        return tuple(piece for piece in self.pieces if piece.sampling)


@dataclass(frozen=True)
class Drawn:
    """The token behind a piece; ``token`` is None where the logits are not finite."""

    token: int | None
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens with their log-probabilities, the likeliest first."""


def blocks_for(tokens: int) -> int:
    """Return how many blocks hold that many tokens."""
    return -(-tokens // BLOCK)
