"""From windows of the token stream to what a model trains on."""

from typing import NamedTuple

import numpy as np
import torch

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


def documents_batch(windows: Ids, firsts: Ids, ends: Ids) -> Batch:
    """Return the batch of ``windows`` ``[samples, context + 1]``, in which no token meets another document.

    ``firsts`` ``[samples]``: where in the stream each window begins. ``ends``: where documents of two or more
    tokens end, and the next begins, ascending.
    """
    targets, positions = windows[:, 1:].copy(), np.empty_like(windows[:, 1:])
    context = targets.shape[1]
    for sample, first in enumerate(firsts):
        begins = ends[np.searchsorted(ends, first, "right") : np.searchsorted(ends, first + context, "right")]
        begins = begins - first
        targets[sample, begins - 1] = IGNORED
        origin = np.zeros(context + 1, np.int64)
        origin[begins] = begins
        positions[sample] = np.arange(context) - np.maximum.accumulate(origin)[:-1]
    return Batch(_tensor(windows[:, :-1]), torch.from_numpy(targets), torch.from_numpy(positions))


def documents_targets(firsts: Ids, context: int, ends: Ids) -> int:
    """Return how many targets ``documents_batch`` leaves at ``firsts``, from the documents' ends alone."""
    begins = np.searchsorted(ends, firsts + context, "right") - np.searchsorted(ends, firsts, "right")
    return int(context * len(firsts) - begins.sum())


def _tensor(ids: Ids) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(ids))
