"""Which layers each chunk holds, and so each stage."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.models.layered import LayeredModel
from pipelinejob_worker.pipeline.balance import WORK_LIMIT, Cuts, Problem, Search, climb, proportional

_MEBIBYTE = 1 << 20
_FLOAT32_BYTES = 4
_BITS = 30  # of the time of all layers, and of a memory limit: the search works on integers
_UNLIMITED = 1 << 62


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs for one microbatch.

    ``forward_seconds``; ``input_seconds`` and ``weight_seconds``: the two parts of the backward pass, where the
    schedule splits it, else all is in the first; ``parameter_bytes``: of the weights alone; ``activation_bytes``: what
    is kept from the forward to the backward pass.
    """

    forward_seconds: float
    input_seconds: float
    weight_seconds: float
    parameter_bytes: int
    activation_bytes: int

    @property
    def backward_seconds(self) -> float:
        """Both parts of the backward pass."""
        return self.input_seconds + self.weight_seconds

    @property
    def seconds(self) -> float:
        """Forward and backward pass."""
        return self.forward_seconds + self.backward_seconds


@dataclass(frozen=True)
class Memory:
    """How much the layers of each stage take, and may take.

    ``limits``: bytes, of each stage; infinite where there is none. ``live_microbatches``: of each stage, how many
    microbatches are between their forward and backward pass at most, a property of the schedule; one that is so in
    one of v chunks only counts 1/v. ``copies``: how often a weight's bytes are held: itself, its gradient, its
    optimizer state.
    """

    limits: Sequence[float]
    live_microbatches: Sequence[float]
    copies: float

    def bytes_of(self, cost: LayerCost, stage: int) -> int:
        """Bytes that a layer takes on ``stage``."""
        return math.ceil(cost.parameter_bytes * self.copies + cost.activation_bytes * self.live_microbatches[stage])


@dataclass(frozen=True)
class Split:
    """The layers of each chunk.

    ``bottleneck_seconds``: what the slowest stage needs for one microbatch. ``lower_bound_seconds``: no split has
    less. ``optimal``: both are the same, proven.
    """

    chunks: list[range]
    bottleneck_seconds: float
    lower_bound_seconds: float
    optimal: bool


class PassSeconds(NamedTuple):
    """How long a chunk takes for one microbatch: forward, and the two parts of the backward pass."""

    forward: float
    input: float
    weight: float


def describe(layers: range) -> str:
    """First and last global layer, for instance ``0-2``."""
    return f"{layers.start}-{layers.stop - 1}"


def even(layers: int, chunks: int) -> list[range]:
    """Give each chunk the same number of layers; where that is no whole number, the first ones get one more.

    Raises ConfigurationError when there are fewer layers than chunks.
    """
    _check_enough(layers, chunks)
    size, more = divmod(layers, chunks)
    return _ranges([0, *accumulate(size + (chunk < more) for chunk in range(chunks))])


def manual(boundaries: Sequence[int], layers: int, chunks: int) -> list[range]:
    """Cut before each layer of ``boundaries``.

    Raises ConfigurationError when they are not one less than the chunks, do not rise, or are no layers of the model.
    """
    _check_enough(layers, chunks)
    if len(boundaries) != chunks - 1:
        raise ConfigurationError(
            f"spec.partition.boundaries: {len(boundaries)} boundaries do not cut the model into {chunks} chunks "
            f"(stages times train.schedule.chunksPerStage); allowed: {chunks - 1}, the first layer of every chunk but "
            f"the first"
        )
    cuts = [0, *boundaries, layers]
    for place, (before, after) in enumerate(pairwise(cuts[:-1])):
        if not before < after < layers:
            raise ConfigurationError(
                f"spec.partition.boundaries[{place}]: {after} begins no chunk; allowed: more than {before}, which "
                f"begins the chunk before, and less than the {layers} layers of the model"
            )
    return _ranges(cuts)


def balanced(
    costs: Sequence[LayerCost],
    stage_of: Sequence[int],
    speeds: Sequence[float],
    memory: Memory | None = None,
    *,
    work_limit: int = WORK_LIMIT,
) -> Split:
    """Cut the layers so that the slowest stage is as fast as possible and each stage fits its memory.

    ``stage_of``: the stage of each chunk; every ``stages`` chunks visit each stage once, all up or all down.
    ``speeds``: of each stage; a layer takes ``cost.seconds / speed``. Of equal splits that with the fastest slowest
    chunk is taken, and of these one with late cuts: equal arguments give equal splits. After ``work_limit`` the best
    split found is returned with what is proven of it (``pipeline/balance.py`` has the algorithm).

    Raises ConfigurationError when there are fewer layers than chunks, or no split was found that fits the memory.
    """
    _check_enough(len(costs), len(stage_of))
    seconds = np.array([[cost.seconds / speed for cost in costs] for speed in speeds])
    total = float(seconds.sum(axis=1).max())
    unit = 2.0 ** (math.frexp(total)[1] - _BITS)  # a power of two, so that equal times stay equal
    sizes, limits = _sizes(costs, memory, len(speeds))
    problem = Problem(stage_of, np.rint(seconds / unit).astype(np.int64), sizes, limits)
    first = proportional(problem)
    if not problem.fits(first):
        assert memory is not None
        first = _smallest(problem, memory, work_limit)
    if len(stage_of) > len(speeds):
        first = climb(problem, first)
    found = Search(problem, work_limit).run(first)
    chunks = _ranges(found.cuts)
    bottleneck = max(_stage_seconds(chunks, costs, speeds, stage_of))
    optimal = found.bound == problem.dearest(found.cuts)
    return Split(chunks, bottleneck, bottleneck if optimal else min(bottleneck, found.bound * unit), optimal)


def chunk_times(
    chunks: Sequence[range], costs: Sequence[LayerCost], speeds: Sequence[float], stage_of: Sequence[int]
) -> list[PassSeconds]:
    """Return how long each chunk takes on its stage for one microbatch."""
    return [
        PassSeconds(
            sum(costs[layer].forward_seconds for layer in layers) / speeds[stage],
            sum(costs[layer].input_seconds for layer in layers) / speeds[stage],
            sum(costs[layer].weight_seconds for layer in layers) / speeds[stage],
        )
        for layers, stage in zip(chunks, stage_of, strict=True)
    ]


def static_costs(model: LayeredModel, samples: int) -> list[LayerCost]:
    """Return costs for a microbatch of ``samples`` by what is known of the layers without running them.

    The seconds are those of a device with 10^12 operations a second, so only their ratios mean anything; each part of
    the backward pass has as many operations as the forward pass. Of the activations only a layer's input is known.
    """
    tokens = samples * model.context
    return [
        LayerCost(
            forward_seconds=cost.flops * tokens / 1e12,
            input_seconds=cost.flops * tokens / 1e12,
            weight_seconds=cost.flops * tokens / 1e12,
            parameter_bytes=_FLOAT32_BYTES * cost.parameters,
            activation_bytes=_FLOAT32_BYTES * tokens * model.width,
        )
        for cost in model.costs
    ]


def _smallest(problem: Problem, memory: Memory, work_limit: int) -> Cuts:
    """Return the split whose fullest stage has the most room; raise ConfigurationError if that has too little."""
    shares = np.rint(problem.sizes * (2.0**_BITS / np.array(memory.limits)[:, None])).astype(np.int64)
    filling = Problem(problem.stage_of, shares, problem.sizes, np.full_like(problem.limits, _UNLIMITED))
    cuts = Search(filling, work_limit).run(climb(filling, proportional(filling))).cuts
    if not problem.fits(cuts):
        needed = problem.stage_sizes(cuts)
        stage = int((needed / problem.limits).argmax())
        raise ConfigurationError(
            f"spec.partition.memoryLimitMiB: in the split that comes closest, stage {stage} needs "
            f"{math.ceil(needed[stage] / _MEBIBYTE)} MiB; allowed: {int(problem.limits[stage]) // _MEBIBYTE} MiB; use "
            f"more spec.stages, spec.train.activationCheckpointing, or smaller microbatches by more "
            f"spec.train.microbatches"
        )
    return cuts


def _sizes(costs: Sequence[LayerCost], memory: Memory | None, stages: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of each layer on each stage, and the limits; a size of 0 where there is no limit."""
    if memory is None:
        return np.zeros((stages, len(costs)), np.int64), np.full(stages, _UNLIMITED)
    limited = [math.isfinite(limit) for limit in memory.limits]
    sizes = [[memory.bytes_of(cost, stage) * limited[stage] for cost in costs] for stage in range(stages)]
    limits = [int(limit) if finite else _UNLIMITED for limit, finite in zip(memory.limits, limited, strict=True)]
    return np.array(sizes, np.int64), np.array(limits, np.int64)


def _stage_seconds(
    chunks: Sequence[range], costs: Sequence[LayerCost], speeds: Sequence[float], stage_of: Sequence[int]
) -> list[float]:
    seconds = [0.0] * len(speeds)
    for times, stage in zip(chunk_times(chunks, costs, speeds, stage_of), stage_of, strict=True):
        seconds[stage] += sum(times)
    return seconds


def _check_enough(layers: int, chunks: int) -> None:
    if layers < chunks:
        raise ConfigurationError(
            f"spec.stages: {layers} layers are too few for {chunks} chunks (stages times "
            f"train.schedule.chunksPerStage); allowed: at most one chunk a layer; lower spec.stages or "
            f"chunksPerStage, or add layers to spec.model"
        )


def _ranges(cuts: Sequence[int]) -> list[range]:
    return [range(start, end) for start, end in pairwise(cuts)]
