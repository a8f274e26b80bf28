"""One stage of a model, ready to run steps: its chunks, its schedule and its links to the other stages."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from pipelinejob_worker.data import Batch
from pipelinejob_worker.models import Chunk, LayeredModel, check_packing
from pipelinejob_worker.pipeline.exchange import Boundary, Exchange
from pipelinejob_worker.pipeline.executor import Executor, Step
from pipelinejob_worker.pipeline.group import Group
from pipelinejob_worker.pipeline.routes import routes
from pipelinejob_worker.pipeline.schedule import Schedule, forward_schedule
from pipelinejob_worker.pipeline.stage import RandomState, StageChunk, prepare_layers
from pipelinejob_worker.pipeline.timeline import Timeline
from pipelinejob_worker.protocol import Train

Load = Callable[[int], Batch]


class Built:
    """The chunks of one stage with their weights, which may outlive the group that they are trained in."""

    def __init__(
        self,
        model: LayeredModel,
        train: Train,
        schedule: Schedule,
        chunks: Sequence[range],
        *,
        stage: int,
        device: torch.device,
    ) -> None:
        """Build the layers of ``stage``; ``chunks`` are those of the whole model, in their order. Not collective."""
        self.state = RandomState(train.seed)
        self._ranges = _ranges(schedule, chunks, stage)
        self.modules: dict[int, Chunk] = {}
        for index, layers in self._ranges.items():
            module = model.build(layers, train.seed).to(device)
            if train.data.packing == "Documents":
                check_packing(model, module, device)
            prepare_layers(module, train, self.state)
            self.modules[index] = module

    def fits(self, schedule: Schedule, chunks: Sequence[range], stage: int) -> bool:
        """Whether these are the chunks of that stage, too."""
        return self._ranges == _ranges(schedule, chunks, stage)


class Engine:
    """Forward and backward passes of one stage; knows neither optimizer nor data."""

    def __init__(
        self,
        model: LayeredModel,
        train: Train,
        schedule: Schedule,
        chunks: Sequence[range],
        group: Group,
        *,
        built: Built | None = None,
    ) -> None:
        """Build the stage's layers, unless they are ``built``. ``chunks``: the layers of all chunks, in their order.

        Collective over all ranks.
        """
        self.timeline = Timeline(group.device)
        self.loss_divisor = 1.0
        self._model = model
        self._group = group
        self._schedule = schedule
        share = train.microbatches // group.pipelines
        built = built or Built(model, train, schedule, chunks, stage=group.stage, device=group.device)
        self._state = built.state
        self._state.first_microbatch = group.pipeline * share
        self.first_microbatch = self._state.first_microbatch
        self.microbatches = share
        samples = train.global_batch_size // train.microbatches
        carries = train.data.packing == "Documents"
        last = len(chunks) - 1
        self._modules = built.modules
        self.layers: Mapping[int, nn.Module] = {
            layer: module for chunk in self._modules.values() for layer, module in chunk.layers.items()
        }
        self.layers_of = {index: tuple(module.layers) for index, module in self._modules.items()}
        stage_chunks = {
            index: StageChunk(module, index, train=train, state=self._state, loss=self._loss if index == last else None)
            for index, module in self._modules.items()
        }
        positions = torch.arange(model.context).expand(samples, model.context)
        boundary = Boundary(model.hidden(samples), positions.to("meta") if carries else None)
        exchange = Exchange(group, boundary, schedule, self.timeline)
        self._executor = Executor(
            stage_chunks, last, exchange, self.timeline, positions.to(group.device), moves=group.computing
        )
        self._routes = routes(schedule, group.stage)
        forward = forward_schedule(schedule, share)
        self._forward_order, self._forward_routes = forward.orders[group.stage], routes(forward, group.stage)

    def forward_and_backward(self, step: int, load: Load, backward_done: Callable[[int], None]) -> list[float]:
        """Fill the gradients; return each microbatch's loss where the last chunk is.

        ``backward_done`` is called with each chunk as soon as its gradients are complete.
        """
        self._state.step = step
        order = self._schedule.orders[self._group.stage]
        losses = self._executor.run(Step(order, self._routes, load, backward_done))
        return [loss.item() for loss in losses]

    def evaluate(self, load: Load) -> list[float]:
        """Run as many microbatches as a step has, forward only and without dropout; return their losses."""
        for module in self._modules.values():
            module.eval()
        losses = self._executor.run(Step(self._forward_order, self._forward_routes, load, lambda _: None))
        for module in self._modules.values():
            module.train()
        return [loss.item() for loss in losses]

    def _loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self._model.loss(logits, targets) / self.loss_divisor


def _ranges(schedule: Schedule, chunks: Sequence[range], stage: int) -> dict[int, range]:
    return {index: chunks[index] for index in schedule.chunks_of(stage)}
