"""The tokenizer of a served model, as its fronts have it."""

from pathlib import Path

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.front.settings import Settings
from pipelinejob_worker.front.tokenizer import Tokenizer, load
from pipelinejob_worker.models import LayeredModel
from pipelinejob_worker.protocol import WorkerConfig

FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


def tokenizer_of(config: WorkerConfig, model: LayeredModel) -> Tokenizer | None:
    """Load the tokenizer that the job names; None where it names none. Raises ConfigurationError."""
    if config.tokenizer is None:
        return None
    if config.tokenizer.name == "Bytes":
        return load(Settings(model=config.job, tokenizer="Bytes"))
    directory = Path(config.tokenizer.path) if config.tokenizer.path else _beside(model)
    return load(Settings(model=config.job, tokenizer_directory=directory))


def _beside(model: LayeredModel) -> Path:
    """Return the directory of the model's own tokenizer; from a hub its files are fetched first."""
    from pipelinejob_worker.models.hugging_face import HuggingFaceModel  # noqa: PLC0415 - imports for seconds

    if not isinstance(model, HuggingFaceModel):
        raise ConfigurationError(
            "spec.serve.tokenizerPath: this model has no tokenizer of its own; allowed: the directory of one"
        )
    first, *_ = [model.repository.find(name) for name in FILES]
    if first is None:
        raise model.repository.refused("has no tokenizer.json; allowed: a model with its tokenizer")
    return first.parent
