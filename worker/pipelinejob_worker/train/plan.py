"""What is decided before the first step: the schedule, which layers each chunk has, and how long a step should take."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pipelinejob_worker.models import LayeredModel
from pipelinejob_worker.pipeline.device import peak_flops
from pipelinejob_worker.pipeline.group import Group
from pipelinejob_worker.pipeline.partition import Memory, balanced, chunk_times, describe, even, manual
from pipelinejob_worker.pipeline.profile import Profile, measured_costs
from pipelinejob_worker.pipeline.schedule import Action, Pass, Schedule, bubble_limit
from pipelinejob_worker.pipeline.simulation import Prediction, simulate
from pipelinejob_worker.protocol import WorkerConfig
from pipelinejob_worker.recovery.cut import Cut
from pipelinejob_worker.train.progress import Expectation

BACKWARD_COST = 2
"""A backward pass computes twice what a forward pass does: gradients of inputs and of weights."""


@dataclass(frozen=True)
class Plan:
    """The same on all ranks."""

    schedule: Schedule
    chunks: Sequence[range]
    prediction: Prediction

    @classmethod
    def kept(cls, cut: Cut, schedule: Schedule) -> "Plan":
        """Return the plan of an earlier incarnation of the same shape."""
        return cls(schedule, cut.chunks, Prediction(cut.seconds, cut.bubble))

    def cut(self, group: Group) -> Cut:
        """Return what the next incarnation of this shape needs to know."""
        return Cut(
            stages=group.stages,
            pipelines=group.pipelines,
            stage_of=tuple(self.schedule.stage_of),
            ends=tuple(layers.stop for layers in self.chunks),
            seconds=self.prediction.seconds,
            bubble=self.prediction.bubble,
        )

    def layers_of(self, stage: int) -> str:
        """First and last layer of each of a stage's chunks, for instance ``0-2,9-11``."""
        return ",".join(describe(self.chunks[chunk]) for chunk in self.schedule.chunks_of(stage))

    def reads_data(self, stage: int) -> bool:
        """Whether the stage has the first chunk, which reads tokens, or the last, which reads targets."""
        return stage in (self.schedule.stage_of[0], self.schedule.stage_of[-1])

    def expectation(self, config: WorkerConfig, model: LayeredModel, group: Group) -> Expectation:
        """What a meter needs to know."""
        train, schedule = config.training, config.training.schedule
        microbatches = train.microbatches // group.pipelines
        tokens = train.global_batch_size * model.context
        peak = peak_flops(group.device, train.precision)
        return Expectation(
            total_steps=train.steps,
            tokens_per_step=tokens,
            flops_per_step=(1 + BACKWARD_COST) * tokens * sum(cost.flops for cost in model.costs),
            peak_flops=peak * group.size if peak else None,
            layers=[self.layers_of(stage) for stage in range(group.stages)],
            bubble_limit=bubble_limit(schedule.name, group.stages, schedule.chunks_per_stage, microbatches),
            predicted_seconds=self.prediction.seconds,
            predicted_bubble=self.prediction.bubble,
        )


def cut(config: WorkerConfig, model: LayeredModel, schedule: Schedule, group: Group, cache: Path | None) -> Plan:
    """Cut the model into chunks as ``spec.partition`` says, and predict a step; collective.

    The layers are measured on the devices; ``cache``: directory that keeps what was measured. Raises
    ConfigurationError where the model cannot be cut so.
    """
    train, layers, chunks = config.training, len(model.names), len(schedule.stage_of)
    if layers < chunks:
        even(layers, chunks)  # says so
    profile = measured_costs(model, train.global_batch_size // train.microbatches, train, group, cache)
    match config.partition.strategy:
        case "Manual":
            ranges = manual(config.partition.boundaries, layers, chunks)
        case "Even":
            ranges = even(layers, chunks)
        case "Balanced":
            memory = _memory(config, schedule, group)
            ranges = balanced(profile.costs, schedule.stage_of, profile.speeds, memory).chunks
    return Plan(schedule, ranges, _predict(schedule, ranges, profile))


def _predict(schedule: Schedule, chunks: Sequence[range], profile: Profile) -> Prediction:
    times = chunk_times(chunks, profile.costs, profile.speeds, schedule.stage_of)

    def seconds(action: Action) -> float:
        time = times[action.chunk]
        match action.kind:
            case Pass.FORWARD:
                return time.forward
            case Pass.INPUT:
                return time.input
            case Pass.WEIGHT:
                return time.weight
            case Pass.BACKWARD:
                return time.input + time.weight

    return simulate(schedule, seconds)


def _memory(config: WorkerConfig, schedule: Schedule, group: Group) -> Memory | None:
    """What the stages may hold; None on a CPU without a limit, whose memory others use too."""
    limit = float(config.partition.memory_limit_mebibytes * 2**20)
    if not limit:
        if group.device.type != "cuda":
            return None
        limit = float(torch.cuda.get_device_properties(group.device).total_memory)
    moments = {"AdamW": 2, "SGD": 1}[config.training.optimizer.name]
    chunks = config.training.schedule.chunks_per_stage
    return Memory(
        limits=[limit] * group.stages,
        live_microbatches=[schedule.live_microbatches(stage) / chunks for stage in range(group.stages)],
        copies=2 + moments / group.pipelines,
    )
