"""Training text as batches of token ids whose order is a pure function of the seed and the step."""

from pipelinejob_worker.data.corpus import Corpus, check_same_data
from pipelinejob_worker.data.packing import Batch
from pipelinejob_worker.data.source import Source

__all__ = ["Batch", "Corpus", "Source", "check_same_data"]
