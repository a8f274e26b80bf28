"""Models as an ordered list of named layers, whatever their source."""

from pipelinejob_worker.models.gpt import Gpt
from pipelinejob_worker.models.layered import LayeredModel
from pipelinejob_worker.protocol import Model


def model_of(source: Model) -> LayeredModel:
    """Return the model that ``source`` names; builds no layer yet."""
    if source.preset is None:
        raise ValueError("spec.model: no source is set; allowed: preset")
    return Gpt(source.preset)


__all__ = ["LayeredModel", "model_of"]
