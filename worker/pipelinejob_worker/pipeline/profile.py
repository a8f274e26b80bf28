"""What each layer costs, measured on the devices that will run it."""

import hashlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeVar

import structlog
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch.autograd.graph import saved_tensors_hooks

from pipelinejob_worker.models import LayeredModel
from pipelinejob_worker.pipeline.group import Group
from pipelinejob_worker.pipeline.partition import LayerCost
from pipelinejob_worker.pipeline.schedule import SPLITS_BACKWARD
from pipelinejob_worker.pipeline.stage import RandomState, StageChunk, check_hidden, prepare_layers
from pipelinejob_worker.protocol import Train
from pipelinejob_worker.state.files import write_durably

log = structlog.get_logger()

EQUAL_SPEEDS = 1.15
"""A stage is slow when even its shortest run takes so many times as long as a usual one of the fastest stage: noise
must not move layers."""

_LEAST_REPEATS, _MOST_REPEATS = 3, 10
_REFERENCE_REPEATS = 3
_ENOUGH_SECONDS = 0.1  # of repeats, when there are the least

_CACHE_LIMIT_BYTES = 1 << 20

Result = TypeVar("Result")


@dataclass(frozen=True)
class Profile:
    """``costs`` of each layer, on the fastest stage; ``speeds`` of each stage, 1 for the fastest."""

    costs: list[LayerCost]
    speeds: list[float]


class _Cost(BaseModel):
    """A LayerCost in the cache."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    forward_seconds: float = Field(gt=0)
    input_seconds: float = Field(ge=0)
    weight_seconds: float = Field(ge=0)
    parameter_bytes: int = Field(ge=0)
    activation_bytes: int = Field(ge=0)


class _Cached(BaseModel):
    """A file of the cache: what was measured, and under what circumstances."""

    model_config = ConfigDict(extra="forbid")

    circumstances: dict[str, str]
    costs: list[_Cost]


def measured_costs(
    model: LayeredModel, samples: int, train: Train, group: Group, cache_directory: Path | None
) -> Profile:
    """Measure layers for microbatches of ``samples`` on every rank, and agree on the result. Collective.

    Every rank runs one layer of each kind; kinds that its cache knows, it need not. Then all run the dearest kind at
    once, so that ranks that share a processor share it alike: that gives the stages' speeds. The time of another kind
    is what it is to the dearest on each rank, the median of that.
    """
    kinds = layer_kinds(model)
    layers = sorted(set(kinds))

    def measure(layer: int) -> LayerCost:
        return measure_layer(model, layer, samples, train, group.device)

    cache = _Cache(cache_directory, _circumstances(model, samples, train, group.device)) if cache_directory else None
    own = cache.read(len(layers)) if cache else None
    if own is None:
        own = [measure(layer) for layer in layers]
        if cache:
            cache.write(own, group.rank)
    by_rank = _exchange(group, [_row(cost) for cost in own])
    dearest = max(range(len(layers)), key=lambda kind: median(sum(rows[kind][:3]) for rows in by_rank))
    reference = _Layer(model, layers[dearest], samples, train, group.device)
    reference.kept_bytes()  # a run that does not count
    runs = [rows[0] for rows in _exchange(group, [[sum(reference.run()) for _ in range(_REFERENCE_REPEATS)]])]
    fastest = min(min(of_rank) for of_rank in runs)
    costs = {
        layer: _agreed([rows[kind] for rows in by_rank], [fastest / sum(rows[dearest][:3]) for rows in by_rank])
        for kind, layer in enumerate(layers)
    }
    speeds = stage_speeds(runs, group.stages)
    log.info("layers measured", kinds=len(layers), layers=len(kinds), speeds=[round(speed, 2) for speed in speeds])
    return Profile([costs[kind] for kind in kinds], speeds)


def stage_speeds(runs: Sequence[Sequence[float]], stages: int) -> list[float]:
    """Return the speed of each stage, 1 for the fastest, from the times of the same work on each rank. Pure.

    A stage is as slow as the slowest of its copies in all pipelines.
    """
    fastest = min(runs, key=min)
    slow = EQUAL_SPEEDS * median(fastest)
    by_rank = [min(fastest) / min(of_rank) if min(of_rank) >= slow else 1.0 for of_rank in runs]
    return [min(by_rank[stage::stages]) for stage in range(stages)]


def layer_kinds(model: LayeredModel) -> list[int]:
    """Return for each layer the first one that is alike: only that is measured.

    Alike are layers with the same operations and weights and with names that differ in numbers only. The first and the
    last are like no other, as they begin with tokens and end in the loss.
    """
    last = len(model.names) - 1
    first_of: dict[object, int] = {}
    return [
        first_of.setdefault((index if index in (0, last) else None, cost, re.sub(r"\d+", "#", name)), index)
        for index, (name, cost) in enumerate(zip(model.names, model.costs, strict=True))
    ]


def measure_layer(model: LayeredModel, index: int, samples: int, train: Train, device: torch.device) -> LayerCost:
    """Run one layer as a chunk of its own, with the loss if it is the last, for a microbatch of ``samples``.

    Of some repeats the shortest counts: what else the machine does only adds. The layer is not compiled, which would
    take far longer than the measurement. It is built for this and freed after it.
    """
    layer = _Layer(model, index, samples, train, device)
    activation_bytes = layer.kept_bytes()
    seconds: list[tuple[float, float, float]] = []
    started = time.perf_counter()
    while len(seconds) < _LEAST_REPEATS or (
        len(seconds) < _MOST_REPEATS and time.perf_counter() - started < _ENOUGH_SECONDS
    ):
        seconds.append(layer.run())
    forward, backward_input, backward_weight = (min(times) for times in zip(*seconds, strict=True))
    return LayerCost(forward, backward_input, backward_weight, layer.parameter_bytes(), activation_bytes)


class _Cache:
    """What was measured under certain circumstances, in a file of its own. Ranks may share it."""

    def __init__(self, directory: Path, circumstances: dict[str, str]) -> None:
        name = hashlib.sha256(repr(sorted(circumstances.items())).encode()).hexdigest()[:32]
        self._path = directory / f"profile-{name}.json"
        self._circumstances = circumstances

    def read(self, count: int) -> list[LayerCost] | None:
        """Return the costs of ``count`` layers; None where there are none that can be used."""
        try:
            with self._path.open("rb") as file:
                content = file.read(_CACHE_LIMIT_BYTES + 1)
            cached = _Cached.model_validate_json(content)
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            log.warning("profile not read", path=str(self._path), error=str(error).splitlines()[0])
            return None
        if (
            cached.circumstances != self._circumstances
            or len(cached.costs) != count
            or len(content) > _CACHE_LIMIT_BYTES
        ):
            log.warning("profile is not what was written for this model and device", path=str(self._path))
            return None
        return [LayerCost(**cost.model_dump()) for cost in cached.costs]

    def write(self, costs: list[LayerCost], rank: int) -> None:
        """Replace the file atomically; where it cannot be written, the next start only takes longer."""
        cached = _Cached(circumstances=self._circumstances, costs=[_Cost(**vars(cost)) for cost in costs])
        new = self._path.with_name(f"{self._path.name}.{rank}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(new, cached.model_dump_json().encode())
            new.replace(self._path)
        except OSError as error:
            log.warning("profile not written", path=str(self._path), error=str(error))


class _Layer:
    """A layer as a chunk, with a microbatch made up for it."""

    def __init__(self, model: LayeredModel, index: int, samples: int, train: Train, device: torch.device) -> None:
        uncompiled = train.model_copy(update={"compile": False})
        state = RandomState(train.seed)
        last = index == len(model.names) - 1
        self._device = device
        self._module = model.build(range(index, index + 1), train.seed).to(device).train()
        prepare_layers(self._module, uncompiled, state)
        self._chunk = StageChunk(self._module, index, train=uncompiled, state=state, loss=model.loss if last else None)
        tokens, hidden = model.inputs(samples), model.hidden(samples)
        self._received = (
            torch.randint(model.vocabulary, tokens.shape, device=device)
            if index == 0
            else torch.randn(hidden.shape, dtype=hidden.dtype, device=device)
        )
        self._targets = torch.randint(model.vocabulary, tokens.shape, device=device)
        self._positions = torch.arange(tokens.shape[1], device=device).expand(tokens.shape)
        self._name, self._hidden = model.names[index], None if last else hidden
        self._gradient = None if last else torch.ones(hidden.shape, dtype=hidden.dtype, device=device)
        self._splits = train.schedule.name in SPLITS_BACKWARD and index > 0  # nobody waits for the gradient of tokens

    def run(self) -> tuple[float, float, float]:
        """Seconds of the forward pass and of the two parts of the backward pass; a whole one is in the first part."""
        _, forward = self._timed(self._forward)
        if not self._splits:
            _, backward = self._timed(lambda: self._chunk.backward(0, self._gradient))
            return forward, backward, 0.0
        _, backward_input = self._timed(lambda: self._chunk.backward_input(0, self._gradient))
        _, backward_weight = self._timed(lambda: self._chunk.backward_weight(0))
        return forward, backward_input, backward_weight

    def kept_bytes(self) -> int:
        """Bytes of the tensors that wait for the backward pass, each storage once, without what is there anyway."""
        shared = (*self._module.parameters(), *self._module.buffers(), self._positions, self._targets)
        always_there = {tensor.untyped_storage().data_ptr() for tensor in shared}
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in always_there:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # the tensor itself might hold the graph that holds it

        keep(self._received)
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            self._forward()
        self._chunk.backward(0, self._gradient)
        return sum(kept.values())

    def parameter_bytes(self) -> int:
        """Bytes of the weights."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self._module.parameters())

    def _forward(self) -> torch.Tensor:
        output = self._chunk.forward(0, self._received, self._positions, self._targets)
        if self._hidden is not None:
            # Between layers of one stage another type is no matter: autocast decides.
            check_hidden(f"layer {self._name}", output, self._hidden.to(output.dtype))
        return output

    def _timed(self, run: Callable[[], Result]) -> tuple[Result, float]:
        self._wait()
        started = time.perf_counter()
        result = run()
        self._wait()
        return result, time.perf_counter() - started

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _circumstances(model: LayeredModel, samples: int, train: Train, device: torch.device) -> dict[str, str]:
    """All that a layer's cost depends on."""
    cuda = device.type == "cuda"
    return {
        "model": model.fingerprint,
        "samples": str(samples),
        "context": str(model.context),
        "packing": train.data.packing,
        "precision": train.precision,
        "activation checkpointing": str(train.activation_checkpointing),
        "split backward": str(train.schedule.name in SPLITS_BACKWARD),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu, {torch.get_num_threads()} threads",
    }


def _row(cost: LayerCost) -> list[float]:
    return [
        cost.forward_seconds,
        cost.input_seconds,
        cost.weight_seconds,
        float(cost.parameter_bytes),
        float(cost.activation_bytes),
    ]


def _agreed(rows: list[list[float]], scales: list[float]) -> LayerCost:
    """Return a layer's cost from what each rank measured, with the scale of its times."""
    forward, backward_input, backward_weight = (
        median(row[part] * scale for row, scale in zip(rows, scales, strict=True)) for part in range(3)
    )
    parameter_bytes, activation_bytes = (int(max(row[part] for row in rows)) for part in (3, 4))
    return LayerCost(forward, backward_input, backward_weight, parameter_bytes, activation_bytes)


def _exchange(group: Group, values: list[list[float]]) -> list[list[list[float]]]:
    """Return the ``values`` of each rank, in their order; exact, as all ranks but one add zero."""
    mine = torch.tensor(values, dtype=torch.float64)
    table = torch.zeros(group.size, *mine.shape, dtype=torch.float64)
    table[group.rank] = mine
    rows: list[list[list[float]]] = group.sum(table).tolist()
    return rows
