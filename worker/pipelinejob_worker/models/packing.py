"""The start-up check that documents in one sample do not see each other."""

import torch

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.models.layered import Chunk, LayeredModel

CHECKED_TOKENS = 64
"""Length of each of the two documents, at most."""

LEAK_TOLERANCE = 1e-6
"""Nothing else than the other document differs, so without a leak at most the order of a sum could."""

SHIFT_TOLERANCE = 1e-2
"""Another sample length may use another kernel; a wrong position changes about as much as there is."""


def check_packing(model: LayeredModel, chunk: Chunk, device: torch.device) -> None:
    """Raise ConfigurationError unless a document passes the chunk alone as it does behind another in a sample.

    Runs the chunk's real layers where they will train, on random inputs, without dropout and in float32. Each chunk
    is checked by the stage that holds it.
    """
    if not model.separates_documents:
        raise _refused("its layers take no positions, so they cannot know where a document begins")
    length = min(CHECKED_TOKENS, model.context // 2)
    generator = torch.Generator().manual_seed(0)
    one, other, document = (_values(model, chunk, length, generator).to(device) for _ in range(3))
    places = torch.arange(length, device=device)[None]
    training = chunk.training
    chunk.eval()
    try:
        with torch.no_grad():
            alone = chunk(document, places).float()
            packed, again = (
                chunk(torch.cat((before, document), dim=1), torch.cat((places, places), dim=1))[:, length:].float()
                for before in (one, other)
            )
    finally:
        chunk.train(training)
    if (leak := _difference(packed, again)) > LEAK_TOLERANCE:
        raise _refused(f"a document changes by {leak:.1e} of its size with the document before it in the sample")
    if (shift := _difference(packed, alone)) > SHIFT_TOLERANCE:
        raise _refused(f"a document alone and behind another differ by {shift:.1e} of its size")


def _values(model: LayeredModel, chunk: Chunk, length: int, generator: torch.Generator) -> torch.Tensor:
    if 0 in chunk.layers:
        return torch.randint(model.vocabulary, (1, length), generator=generator)
    return torch.randn(1, length, model.width, generator=generator)


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative to the size of the second, so that few outliers decide nothing."""
    difference: torch.Tensor = torch.linalg.vector_norm(one - other) / torch.linalg.vector_norm(other)
    return float(difference)


def _refused(reason: str) -> ConfigurationError:
    return ConfigurationError(
        f"spec.train.data.packing: Documents does not fit this model: {reason}; allowed: Stream, or a model whose "
        "attention ends where positions restart at 0"
    )
