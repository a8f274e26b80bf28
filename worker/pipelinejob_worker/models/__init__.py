"""Models as an ordered list of named layers, whatever their source."""

from pipelinejob_worker.models.gpt import Gpt
from pipelinejob_worker.models.layered import IGNORED, Chunk, LayeredModel, Tie
from pipelinejob_worker.protocol import Model


def model_of(source: Model, *, documents: bool = False) -> LayeredModel:
    """Return the model that ``source`` names; builds no layer yet.

    ``documents``: samples hold several documents that must not see each other.
    """
    if source.preset is None:
        raise ValueError("spec.model: no source is set; allowed: preset")
    return Gpt(source.preset, documents=documents)


__all__ = ["IGNORED", "Chunk", "LayeredModel", "Tie", "model_of"]
