"""A decoder of the transformers library as an ordered list of layers."""

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.models.hugging_face.anatomy import IndivisibleError, dissect
from pipelinejob_worker.models.hugging_face.chunk import HuggingFaceChunk, check_parts
from pipelinejob_worker.models.hugging_face.configuration import architecture_of, identity, read_config
from pipelinejob_worker.models.hugging_face.repository import Repository
from pipelinejob_worker.models.layered import Chunk, LayeredModel, Tie
from pipelinejob_worker.protocol import HuggingFace


class HuggingFaceModel(LayeredModel):
    """Layers ``embedding``, ``layers.0`` ... ``layers.<n-1>``, ``head``.

    The parameters of a layer are named as in its module, those of ``embedding`` and ``head`` as in the whole model.
    Raises ConfigurationError when the model cannot be read or cannot be cut.
    """

    def __init__(self, source: HuggingFace) -> None:
        self.repository = Repository(source.path, source.revision)
        self.config, self.raw_config = read_config(self.repository)
        architecture = architecture_of(self.config, self.repository)
        self.context = source.context
        self._check_context()
        try:
            # A token sees half of the context on average.
            self.anatomy = dissect(architecture, self.config, tokens=max(1, source.context // 2))
            check_parts(self.anatomy, self.config)
        except IndivisibleError as error:
            raise self.repository.refused(
                f"{architecture.__name__} cannot be cut into stages: {error}; allowed: a decoder whose base model has "
                "one list of layers that pass on one hidden state"
            ) from error
        last = self.anatomy.count + 1
        self.names = ("embedding", *(f"layers.{index}" for index in range(self.anatomy.count)), "head")
        self.costs = self.anatomy.costs
        self.vocabulary = self.anatomy.vocabulary
        self.width = self.anatomy.width
        if self.anatomy.tie:
            self.ties = (Tie(0, self.anatomy.tie[0], last, self.anatomy.tie[1]),)
        self.identity = identity(self.raw_config)
        self.fingerprint = f"{self.identity} context={self.context}"
        self.separates_documents = self.anatomy.takes_positions

    def build(self, indices: range, seed: int) -> Chunk:
        """Build the layers ``indices`` with the weights of the model's files, whatever the seed.

        Raises ConfigurationError.
        """
        del seed
        return HuggingFaceChunk(self.anatomy, indices, self.config, self.repository)

    def _check_context(self) -> None:
        limit = getattr(self.config, "max_position_embeddings", None)
        if limit and self.context > limit:
            raise ConfigurationError(
                f"spec.model.huggingFace.context: {self.context} is more than the positions of "
                f"{self.repository.path}; allowed: 2 to {limit}"
            )
