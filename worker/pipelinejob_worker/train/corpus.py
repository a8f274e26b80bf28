"""Opens a job's data for its model."""

from pipelinejob_worker.data import Corpus
from pipelinejob_worker.models import LayeredModel
from pipelinejob_worker.protocol import HuggingFace, WorkerConfig


def open_corpus(config: WorkerConfig, model: LayeredModel) -> Corpus:
    """Open the job's data, which may take long; raises ConfigurationError where they do not fit the model."""
    source = config.model.hugging_face
    data = config.training.data
    own_tokenizer = source and data.tokenizer == "HuggingFace" and not data.tokenizer_path
    directory = _tokenizer_directory(source) if source and own_tokenizer else ""
    return Corpus(config.training, model.context, model.vocabulary, directory)


def _tokenizer_directory(source: HuggingFace) -> str:
    """Where the model's tokenizer lies, fetched from the hub if the model is there."""
    if source.path.startswith("/"):
        return source.path
    from pipelinejob_worker.models.hugging_face.repository import Repository  # noqa: PLC0415 - imports for seconds

    repository = Repository(source.path, source.revision)
    repository.find("tokenizer_config.json")
    tokenizer = repository.find("tokenizer.json")
    if tokenizer is None:
        raise repository.refused(
            "has no tokenizer.json; allowed: a repository with one, or spec.train.data.tokenizerPath"
        )
    return str(tokenizer.parent)
