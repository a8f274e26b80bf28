"""Models as an ordered list of named layers, whatever their source."""

from pipelinejob_worker.models.gpt import Gpt
from pipelinejob_worker.models.layered import IGNORED, Chunk, ChunkOfList, Cost, LayeredModel, ListModel, Tie
from pipelinejob_worker.models.module import model_of_module
from pipelinejob_worker.models.packing import check_packing
from pipelinejob_worker.protocol import Model


def model_of(source: Model, *, documents: bool = False) -> LayeredModel:
    """Return the model that ``source`` names; builds no layer yet.

    ``documents``: samples hold several documents that must not see each other. Raises ConfigurationError when the
    source cannot be read or is no model that can be cut into stages.
    """
    if source.preset:
        return Gpt(source.preset, documents=documents)
    if source.module:
        return model_of_module(source.module)
    if source.hugging_face:
        from pipelinejob_worker.models.hugging_face import HuggingFaceModel  # noqa: PLC0415 - imports for seconds

        return HuggingFaceModel(source.hugging_face)
    raise ValueError("spec.model: no source is set; allowed: one of preset, huggingFace, module")


__all__ = ["IGNORED", "Chunk", "ChunkOfList", "Cost", "LayeredModel", "ListModel", "Tie", "check_packing", "model_of"]
