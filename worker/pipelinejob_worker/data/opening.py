"""From spec.train.data to token ids on disk."""

from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipelinejob_worker.data.files import find, sizes_of
from pipelinejob_worker.data.refusal import refusal
from pipelinejob_worker.data.tokens import Ids, TokenFile
from pipelinejob_worker.protocol.train import Data


class OpenTokens(NamedTuple):
    """Documents as tokens."""

    files: list[TokenFile]
    ends: Ids
    """Where in the stream each document ends, ascending."""
    identity: str
    """What determines the stream and how it is cut; equal for equal samples."""


def open_tokens(data: Data, vocabulary: int, model_directory: str, cache: Path) -> OpenTokens:
    """Return the tokens of all documents, in the order of their sorted paths."""
    if vocabulary < 256:
        raise refusal(
            "tokenizer",
            f"Bytes has 256 tokens, the model knows {vocabulary}",
            "a tokenizer whose ids the model knows",
            "use the model's own tokenizer or a model with a larger vocabulary",
        )
    paths = find(data)
    sizes = sizes_of(paths)
    files = [TokenFile(path, np.dtype(np.uint8), size) for path, size in zip(paths, sizes, strict=True)]
    listing = "\n".join(f"{path} {size}" for path, size in zip(paths, sizes, strict=True))
    return OpenTokens(files, np.array(list(accumulate(sizes)), np.int64), listing)
