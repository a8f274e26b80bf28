"""Which pipeline serves a request: where its prefix has been before, unless that one is too busy."""

import hashlib
import math
from array import array
from collections.abc import Mapping, Sequence

PREFIX_TOKENS = 64
"""Prompts that agree in this many first tokens, a system prompt for instance, go to the same pipeline."""

HEADROOM = 1.25
"""How much busier than the mean a pipeline may be, itself included, before others take over its prefixes."""


def choose(prompt: Sequence[int], loads: Mapping[int, int]) -> int:
    """Return one of the pipelines in ``loads``, which maps each to its unfinished requests.

    Rendezvous hashing (Thaler and Ravishankar 1998) of the first tokens: when a pipeline leaves, only its own
    prefixes move. With bounded loads (Mirrokni, Thorup and Zadimoghaddam 2018): a pipeline that would exceed
    ``HEADROOM`` times the mean is passed over, so that one popular prefix does not queue while others idle.
    Raises ValueError when there is no pipeline.
    """
    if not loads:
        raise ValueError("no pipeline to choose from")
    allowed = math.ceil(HEADROOM * (sum(loads.values()) + 1) / len(loads))
    prefix = array("q", prompt[:PREFIX_TOKENS]).tobytes()
    return max((pipeline for pipeline, load in loads.items() if load < allowed), key=lambda one: _score(prefix, one))


def _score(prefix: bytes, pipeline: int) -> tuple[bytes, int]:
    return hashlib.blake2b(prefix, digest_size=8, salt=pipeline.to_bytes(8, "big")).digest(), pipeline
