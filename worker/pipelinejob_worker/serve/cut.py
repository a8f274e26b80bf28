"""Which layers each stage serves: what the stages tell each other, and what follows from it, the same on all.

A cut is kept as long as anyone holds it: a stage that comes anew takes its place in it, and the others need not load
anything again.
"""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from pydantic import Field

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.models import LayeredModel
from pipelinejob_worker.pipeline.partition import LayerCost, Memory, balanced, even, manual
from pipelinejob_worker.pipeline.profile import layer_kinds, stage_speeds
from pipelinejob_worker.protocol import Partition
from pipelinejob_worker.protocol.base import Wire

Exchange = Callable[[dict[str, Any]], list[dict[str, Any]]]
"""Tells all stages something, and returns what each has said."""

MEASURED_TOKENS = 32
"""Of a batch, for measuring: some requests that get their next token, and a piece of a prompt."""

REPEATS = 5


class Held(Wire):
    """What a stage has loaded: the cut of all stages, and the step of the checkpoint, 0 without one."""

    layers: int = Field(ge=1)
    starts: tuple[int, ...] = Field(min_length=1, max_length=8192)
    """First layer of each stage."""
    step: int = Field(ge=0)

    @property
    def cut(self) -> list[range]:
        """The layers of each stage."""
        return [range(*ends) for ends in zip(self.starts, (*self.starts[1:], self.layers), strict=True)]


class Offer(Wire):
    """What a stage could serve: what it holds, and the steps of the checkpoints that it sees; none without a source."""

    held: Held | None = None
    steps: tuple[int, ...] = ()


def agree(offers: Sequence[Offer], wanted_step: int) -> tuple[Held | None, int]:
    """Return the cut for so many stages that is kept, None if there is none, and the step of the checkpoint.

    ``wanted_step``: 0 keeps what is held, else takes the newest. Without a checkpoint the step is 0. Raises
    ConfigurationError where the stages see no checkpoint in common.
    """
    fitting = [offer.held if offer.held and len(offer.held.starts) == len(offers) else None for offer in offers]
    held = [one for one in fitting if one]
    if any(offer.steps or (offer.held and offer.held.step) for offer in offers):
        # Who holds a step of this cut need not read it again.
        visible = [{*offer.steps, *([one.step] if one else [])} for offer, one in zip(offers, fitting, strict=True)]
        common = set[int].intersection(*visible)
        step = _step(common, {one.step for one in held}, wanted_step)
    else:
        step = 0
    return max(held, key=lambda one: (one.step == step, one.starts), default=None), step


def _step(common: set[int], held: set[int], wanted: int) -> int:
    if (wanted or next(iter(common), 0)) not in common:
        what = f"checkpoint of step {wanted}" if wanted else "checkpoint"
        raise ConfigurationError(
            f"spec.model.fromJob.step: the stages see no {what} in common; allowed: "
            f"{', '.join(map(str, sorted(common))) or 'a claim that all stages mount'}"
        )
    return wanted or max(common & held or common)


def cut(
    model: LayeredModel, partition: Partition, stages: int, device: torch.device, exchange: Exchange
) -> list[range]:
    """Cut the model as ``spec.partition`` says; all stages call it at once. Raises ConfigurationError."""
    layers = len(model.names)
    match partition.strategy:
        case "Manual":
            return manual(partition.boundaries, layers, stages)
        case "Even":
            return even(layers, stages)
    if stages == 1 or layers <= stages:  # the only way, or none, which that says
        return even(layers, stages)
    kinds = layer_kinds(model)
    representatives = sorted(set(kinds))
    notes = exchange({"costs": [_measure(model, layer, device) for layer in representatives]})
    by_stage = [note["costs"] for note in notes]
    dearest = max(range(len(representatives)), key=lambda kind: median(costs[kind][0] for costs in by_stage))
    # All at once, so that stages that share a processor share it alike.
    runs = [note["runs"] for note in exchange({"runs": _runs(model, representatives[dearest], device)})]
    costs = {
        layer: LayerCost(
            # As the stages are of different speeds, the ratio to the dearest kind is what they agree on.
            median(costs[kind][0] / costs[dearest][0] for costs in by_stage) * min(map(min, runs)),
            0.0,
            0.0,
            max(costs[kind][1] for costs in by_stage),
            0,
        )
        for kind, layer in enumerate(representatives)
    }
    memory = _memory(partition, stages)
    return balanced([costs[kind] for kind in kinds], list(range(stages)), stage_speeds(runs, stages), memory).chunks


def _memory(partition: Partition, stages: int) -> Memory | None:
    limit = float(partition.memory_limit_mebibytes << 20)
    return Memory([limit] * stages, [0.0] * stages, copies=1) if limit else None


def _measure(model: LayeredModel, layer: int, device: torch.device) -> tuple[float, int]:
    """Return the seconds of a forward pass of one layer, and the bytes of its weights."""
    size = 4 * model.costs[layer].parameters
    return min(_runs(model, layer, device)), size


def _runs(model: LayeredModel, layer: int, device: torch.device) -> list[float]:
    """Build the layer for this, run it some times, and return the seconds of each but the first."""
    chunk = model.build(range(layer, layer + 1), seed=0).to(device).eval()
    tokens = min(MEASURED_TOKENS, model.context)
    positions = torch.arange(tokens, device=device)[None]
    received = (
        torch.zeros(1, tokens, dtype=torch.int64, device=device)
        if layer == 0
        else torch.randn(1, tokens, model.width, device=device)
    )
    seconds = []
    with torch.inference_mode():
        for _ in range(REPEATS + 1):
            began = time.perf_counter()
            chunk(received, positions)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - began)
    return seconds[1:]
