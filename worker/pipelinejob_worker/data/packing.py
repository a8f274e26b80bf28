"""From windows of the token stream to what a model trains on."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipelinejob_worker.data.tokens import Ids
from pipelinejob_worker.models.layered import IGNORED


class Batch(NamedTuple):
    """Samples in the order of the global batch."""

    tokens: torch.Tensor
    """int64 ``[samples, context]``: what the first stage reads."""

    targets: torch.Tensor
    """int64 ``[samples, context]``: each position's next token, IGNORED where there is no loss."""

    positions: torch.Tensor | None
    """int64 ``[samples, context]`` with packing Documents: each token's place in its document, as far as the sample
    shows it; the first token of a sample has place 0. None with packing Stream.
    """


def stream_batch(windows: Ids) -> Batch:
    """Return the batch of ``windows`` ``[samples, context + 1]``, in which every token predicts the next one."""
    return Batch(_tensor(windows[:, :-1]), _tensor(windows[:, 1:]), None)


def documents_batch(windows: Ids, firsts: Ids, starts: Ids) -> Batch:
    """Return the batch of ``windows`` ``[samples, context + 1]``, in which no token meets another document.

    ``firsts`` ``[samples]``: where in the stream each window begins. ``starts``: where documents begin, ascending.
    """
    targets, positions = windows[:, 1:].copy(), np.empty_like(windows[:, 1:])
    context = targets.shape[1]
    for sample, first in enumerate(firsts):
        begins = starts[np.searchsorted(starts, first, "right") : np.searchsorted(starts, first + context, "right")]
        begins = begins - first
        targets[sample, begins - 1] = IGNORED
        origin = np.zeros(context + 1, np.int64)
        origin[begins] = begins
        positions[sample] = np.arange(context) - np.maximum.accumulate(origin)[:-1]
    return Batch(_tensor(windows[:, :-1]), torch.from_numpy(targets), torch.from_numpy(positions))


def documents_targets(firsts: Ids, context: int, starts: Ids) -> int:
    """Return how many targets ``documents_batch`` leaves in the windows at ``firsts``, from the starts alone."""
    begins = np.searchsorted(starts, firsts + context, "right") - np.searchsorted(starts, firsts, "right")
    return int(context * len(firsts) - begins.sum())


def starts_of(ends: NDArray[np.int64]) -> Ids:
    """Return where documents begin that end, each at the begin of the next, at ``ends``."""
    return np.concatenate(([0], ends[:-1])).astype(np.int64) if len(ends) else ends


def _tensor(ids: Ids) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(ids))
