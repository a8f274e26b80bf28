"""Decoders of the transformers library, cut into layers by one rule that knows no architecture."""

from pipelinejob_worker.models.hugging_face.model import HuggingFaceModel

__all__ = ["HuggingFaceModel"]
