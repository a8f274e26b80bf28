"""One stage: its layers, and torch's PipelineStage around them with a clock for the time spent computing."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage

from pipelinejob_worker.models import LayeredModel
from pipelinejob_worker.models.randomness import mix
from pipelinejob_worker.pipeline.group import Group


class ComputeClock:
    """Sums the time that a device spends in forward and backward passes, without waiting for messages."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of the block; on CUDA, which works behind the host's back, by events."""
        if self._device.type == "cuda":
            start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started

    def take(self) -> float:
        """Return the seconds counted since the last call; waits for the device."""
        if self._events:
            torch.cuda.synchronize(self._device)
            self._seconds += sum(start.elapsed_time(end) for start, end in self._events) / 1000
            self._events.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class StageModule(nn.Module):
    """The contiguous layers of one stage, under their global indices.

    Before each layer's forward the random state is set to a function of (seed, step, microbatch, layer), so
    dropout does not depend on which stage runs the layer or on what ran before.
    """

    def __init__(self, model: LayeredModel, layers: range, seed: int, device: torch.device) -> None:
        super().__init__()
        self.indices = layers
        self.layers = nn.ModuleList(model.build(index, seed) for index in layers).to(device)
        self.seed = seed
        self.step = 0

    def forward(self, hidden: torch.Tensor, microbatch: int) -> torch.Tensor:
        """Pass one microbatch through the layers; the first stage gets token ids, others hidden states."""
        for index, layer in zip(self.indices, self.layers, strict=True):
            torch.manual_seed(mix(self.seed, self.step, microbatch, index))
            hidden = layer(hidden)
        return hidden


class TimedStage(PipelineStage):
    """PipelineStage that counts the time of its passes.

    All shapes are given at construction: torch would otherwise find them by an extra pass that is not
    pipelined, and would exchange them pickled. A stage after the first needs inputs that require gradients,
    or its backward fails.
    """

    def __init__(self, module: StageModule, model: LayeredModel, samples: int, group: Group) -> None:
        received = model.inputs(samples) if group.first else model.hidden(samples).requires_grad_()
        passed_on = model.outputs(samples) if group.last else model.hidden(samples)
        self.clock = ComputeClock(group.device)
        super().__init__(
            module,
            group.stage,
            group.stages,
            group.device,
            input_args=(received,),
            output_args=(passed_on.requires_grad_(),),
        )

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        """Run one microbatch forward, timed."""
        with self.clock.running():
            return super().forward_one_chunk(*args, **kwargs)

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        """Run one microbatch backward, timed."""
        with self.clock.running():
            return super().backward_one_chunk(*args, **kwargs)
