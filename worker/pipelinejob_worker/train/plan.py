"""What is decided before the first step: the schedule, which layers each chunk has, and how long a step should take."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipelinejob_worker.models import LayeredModel
from pipelinejob_worker.pipeline.device import peak_flops
from pipelinejob_worker.pipeline.group import Group
from pipelinejob_worker.pipeline.partition import Memory, balanced, describe, even, manual, static_costs
from pipelinejob_worker.pipeline.schedule import Schedule, bubble_limit, build_schedule
from pipelinejob_worker.pipeline.simulation import Prediction
from pipelinejob_worker.protocol import WorkerConfig
from pipelinejob_worker.train.progress import Expectation

BACKWARD_COST = 2
"""A backward pass computes twice what a forward pass does: gradients of inputs and of weights."""


@dataclass(frozen=True)
class Plan:
    """The same on all ranks."""

    schedule: Schedule
    chunks: Sequence[range]
    prediction: Prediction | None

    def layers_of(self, stage: int) -> str:
        """First and last layer of each of a stage's chunks, for instance ``0-2,9-11``."""
        return ",".join(describe(self.chunks[chunk]) for chunk in self.schedule.chunks_of(stage))

    def reads_data(self, stage: int) -> bool:
        """Whether the stage has the first chunk, which reads tokens, or the last, which reads targets."""
        return stage in (self.schedule.stage_of[0], self.schedule.stage_of[-1])

    def expectation(self, config: WorkerConfig, model: LayeredModel, group: Group) -> Expectation:
        """What a meter needs to know."""
        train = config.train
        tokens = train.global_batch_size * model.context
        peak = peak_flops(group.device, train.precision)
        return Expectation(
            total_steps=train.steps,
            tokens_per_step=tokens,
            flops_per_step=(1 + BACKWARD_COST) * tokens * sum(cost.flops for cost in model.costs),
            peak_flops=peak * group.size if peak else None,
            layers=[self.layers_of(stage) for stage in range(group.stages)],
            bubble_limit=bubble_limit(
                train.schedule.name, group.stages, train.schedule.chunks_per_stage, train.microbatches // group.pipelines
            ),
            predicted_seconds=self.prediction.seconds if self.prediction else None,
            predicted_bubble=self.prediction.bubble if self.prediction else None,
        )


def cut(config: WorkerConfig, model: LayeredModel, schedule: Schedule, group: Group) -> Plan:
    """Cut the model into chunks as ``spec.partition`` says; collective.

    Raises ConfigurationError where that cannot be done.
    """
    partition, layers, chunks = config.partition, len(model.names), len(schedule.stage_of)
    if partition.strategy == "Manual":
        return Plan(schedule, manual(partition.boundaries, layers, chunks), None)
    if partition.strategy == "Even":
        return Plan(schedule, even(layers, chunks), None)
    samples = config.train.global_batch_size // config.train.microbatches
    costs = static_costs(model, samples)
    speeds = [1.0] * group.stages
    split = balanced(costs, schedule.stage_of, speeds, _memory(config, schedule, group))
    return Plan(schedule, split.chunks, None)


def _memory(config: WorkerConfig, schedule: Schedule, group: Group) -> Memory | None:
    """What the stages may hold; None on a CPU without a limit, whose memory others use too."""
    limit = float(config.partition.memory_limit_mebibytes * 2**20)
    if not limit:
        if group.device.type != "cuda":
            return None
        limit = float(torch.cuda.get_device_properties(group.device).total_memory)
    moments = {"AdamW": 2, "SGD": 1}[config.train.optimizer.name]
    chunks = config.train.schedule.chunks_per_stage
    return Memory(
        limits=[limit] * group.stages,
        live_microbatches=[schedule.live_microbatches(stage) / chunks for stage in range(group.stages)],
        copies=2 + moments / group.pipelines,
    )
