"""What the ranks agree on in every step, in one all-reduce of float64.

Every slot but the flags is zero on all ranks but one, so the sum is exact and has the same bits for every split; what
has to be added up is added here, in the order of layers and microbatches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pipelinejob_worker.pipeline.group import Group
from pipelinejob_worker.pipeline.timeline import Activity
from pipelinejob_worker.train.optimizer import NormSlots

ACTIVITIES = tuple(Activity)


@dataclass(frozen=True)
class Ballot:
    """What one rank contributes."""

    norms: Mapping[int, Sequence[float]]
    """Squared gradient norms of the parameters that this rank has summed, by layer."""

    losses: Sequence[float]
    """Of this pipeline's microbatches, on the stage of the last chunk; empty elsewhere."""

    seconds: Mapping[Activity, float]
    flags: Sequence[float]
    """Of any meaning; they are added up over the ranks."""


@dataclass(frozen=True)
class Result:
    """What all ranks know then."""

    squared_norms: list[float]
    """Of each layer."""

    loss: float
    seconds: list[dict[Activity, float]]
    """Of each rank."""

    flags: list[float]


def vote(group: Group, slots: NormSlots, microbatches: int, first_microbatch: int, ballot: Ballot) -> Result:
    """Exchange the ballots; ``microbatches`` are those of all pipelines. Collective over all ranks."""
    parts = [slots.size, microbatches, group.size * len(ACTIVITIES), len(ballot.flags)]
    vector = torch.zeros(sum(parts), dtype=torch.float64)
    norms, losses, seconds, flags = torch.split(vector, parts)
    slots.fill(norms, ballot.norms)
    losses[first_microbatch : first_microbatch + len(ballot.losses)] = _tensor(ballot.losses)
    mine = [ballot.seconds[activity] for activity in ACTIVITIES]
    seconds.view(group.size, len(ACTIVITIES))[group.rank] = _tensor(mine)
    flags[:] = _tensor(ballot.flags)
    norms, losses, seconds, flags = torch.split(group.sum(vector), parts)
    return Result(
        squared_norms=slots.per_layer(norms.tolist()),
        loss=sum(losses.tolist()),
        seconds=[dict(zip(ACTIVITIES, row, strict=True)) for row in seconds.view(group.size, -1).tolist()],
        flags=flags.tolist(),
    )


def _tensor(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)
