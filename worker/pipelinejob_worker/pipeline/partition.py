"""Which layers each stage holds."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from pipelinejob_worker.errors import ConfigurationError


def partition(costs: Sequence[float], stages: int) -> list[range]:
    """Cut layers into ``stages`` contiguous, non-empty ranges so that the dearest is as cheap as possible.

    Exact, by dynamic programming over (stages, layers) (the linear partition problem; Skiena, *The Algorithm
    Design Manual*, section 10.7). For a fixed number of stages the best cut moves only to the right as layers
    are added, so all takes ``O(stages * layers)``. Equal results cut as late as possible: deterministic.

    Raises ConfigurationError when there are fewer layers than stages.
    """
    layers = len(costs)
    if layers < stages:
        raise ConfigurationError(
            f"spec.stages: {stages} stages cannot share {layers} layers; allowed: at most one stage a layer; "
            f"lower spec.stages to {layers} or add layers to spec.model"
        )
    before = [0.0, *accumulate(costs)]
    best = before[:]  # best[end]: dearest stage when the first `end` layers are cut into the stages so far
    cuts: list[list[int]] = []
    for stage in range(1, stages):
        following = [float("inf")] * (layers + 1)
        choice = [0] * (layers + 1)
        cut = stage
        for end in range(stage + 1, layers + 1):
            while cut + 1 < end and _dearest(best, before, cut + 1, end) <= _dearest(best, before, cut, end):
                cut += 1
            following[end], choice[end] = _dearest(best, before, cut, end), cut
        best = following
        cuts.append(choice)
    ends = [layers]
    for choice in reversed(cuts):
        ends.append(choice[ends[-1]])
    return [range(start, end) for start, end in pairwise([0, *reversed(ends)])]


def describe(layers: range) -> str:
    """First and last global layer, for instance ``0-2``."""
    return f"{layers.start}-{layers.stop - 1}"


def _dearest(best: Sequence[float], before: Sequence[float], cut: int, end: int) -> float:
    return max(best[cut], before[end] - before[cut])
