"""The job whose checkpoint another one serves, as far as that needs to know it."""

from dataclasses import dataclass

from pipelinejob_operator.api.v1alpha1 import Spec
from pipelinejob_worker.protocol import HuggingFace, Model, Tokenizer, Train


@dataclass(frozen=True)
class SourceJob:
    """A job that has trained, or trains, a model that can be served."""

    name: str
    claim_name: str
    model: Model
    seed: int
    tokenizer: Tokenizer
    checkpoint_step: int
    """Step of its newest complete checkpoint; 0 before the first."""

    @classmethod
    def of(cls, name: str, spec: Spec, train: Train, checkpoint_step: int) -> "SourceJob":
        """Take what matters from a job's spec and status."""
        return cls(
            name=name,
            claim_name=spec.checkpoint.volume_claim_name,
            model=spec.model,
            seed=train.seed,
            tokenizer=trained_with(train, spec.model),
            checkpoint_step=checkpoint_step,
        )


def trained_with(train: Train, model: Model) -> Tokenizer:
    """Name the tokenizer of the training data; data that is tokens already came from the model's own."""
    data = train.data
    if data.tokenizer == "HuggingFace" and data.tokenizer_path:
        return Tokenizer(name="HuggingFace", path=data.tokenizer_path)
    if model.hugging_face and (data.tokenizer == "HuggingFace" or data.format == "Tokens"):
        return own(model.hugging_face)
    return Tokenizer(name="Bytes")


def own(model: HuggingFace) -> Tokenizer:
    """Name the tokenizer in a model's own directory or repository."""
    return Tokenizer(name="HuggingFace", path=model.path if model.path.startswith("/") else "")
