"""The order of forward and backward passes, and what it allows at best."""

from collections.abc import Callable

import torch
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

from pipelinejob_worker.errors import ConfigurationError

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def check_schedule(name: str, stages: int, microbatches: int) -> None:
    """Raise ConfigurationError when 1F1B has fewer microbatches than stages."""
    if name == "1F1B" and microbatches < stages:
        raise ConfigurationError(
            f"spec.train.microbatches: {microbatches} is too few for schedule 1F1B on {stages} stages; allowed: "
            f"{stages} or more, or schedule GPipe"
        )


def build_schedule(name: str, stage: PipelineStage, microbatches: int, loss: Loss) -> PipelineScheduleSingle:
    """Return torch's schedule of that name over one stage a rank.

    Gradients are summed over the microbatches, in their order, not averaged: ``loss`` must already be divided
    by the tokens of the whole step.
    """
    kind = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}[name]
    return kind(stage, microbatches, loss_fn=loss, scale_grads=False)


def bubble_limit(stages: int, microbatches: int) -> float:
    """Smallest idle share of the stages, 0 to 1, when all are equally fast: ``(p - 1) / (m + p - 1)``.

    The same for GPipe (Huang et al. 2019, section 2.3) and 1F1B with a flush (Narayanan et al. 2021, section
    2.2): they differ in the activations held, not in the idle time.
    """
    return (stages - 1) / (microbatches + stages - 1)
