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


class Engine:
    """Forward and backward passes of one stage; knows neither optimizer nor data."""

    def __init__(
        self, model: LayeredModel, train: Train, schedule: Schedule, chunks: Sequence[range], group: Group
    ) -> None:
        """Build the stage's layers. ``chunks`` are the layers of all chunks of the model, in their order.

        Collective over all ranks.
        """
        self.timeline = Timeline(group.device)
        self.loss_divisor = 1.0
        self._model = model
        self._group = group
        self._schedule = schedule
        share = train.microbatches // group.pipelines
        self._state = RandomState(train.seed, group.pipeline * share)
        self.first_microbatch = self._state.first_microbatch
        self.microbatches = share
        samples = train.global_batch_size // train.microbatches
        carries = train.data.packing == "Documents"
        last = len(chunks) - 1
        self._modules: dict[int, Chunk] = {}
        for index in schedule.chunks_of(group.stage):
            module = model.build(chunks[index], train.seed).to(group.device)
            if carries:
                check_packing(model, module, group.device)
            prepare_layers(module, train, self._state)
            self._modules[index] = module
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
        self._executor = Executor(stage_chunks, last, exchange, self.timeline, positions.to(group.device))
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
