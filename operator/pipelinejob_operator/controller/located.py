"""Where the stages of a gang are: their domains, and which levels their links cross. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelinejob_operator.api.placement import CrossingStatus, PlacementStatus
from pipelinejob_operator.build.job import Job
from pipelinejob_operator.build.place import Shape
from pipelinejob_operator.placement.fit import Node
from pipelinejob_operator.placement.planner import cost_of
from pipelinejob_operator.placement.topology import Level, path
from pipelinejob_operator.policy.facts import StagePod

PLANNED, MIXED, UNPLANNED, DELEGATED = "Planned", "PartlyPlanned", "Unplanned", "Delegated"


@dataclass(frozen=True)
class Located:
    """What the status shows of a placement."""

    status: PlacementStatus
    domains: Mapping[tuple[int, int], tuple[str, ...]]
    """By pipeline and stage: from the widest level to the narrowest above the host."""


def locate(
    job: Job, shape: Shape, gang: Mapping[int, StagePod], nodes: Sequence[Node], levels: Sequence[Level]
) -> Located:
    """Look at a job's gang (rank to pod) of which every pod has a node; ``nodes`` holds these."""
    names = [gang[rank].node for rank in range(shape.size)]
    result = cost_of(nodes, levels, names, shape.pipelines, rings=job.rings)
    known = {node.name: path(node, levels)[:-1] for node in nodes}
    crossings = [
        CrossingStatus(level=item.level, count=item.chain, between_pipelines=item.ring) for item in result.crossings
    ]
    return Located(
        PlacementStatus(strategy=strategy(job, gang), crossings=crossings, cost=str(result.cost)),
        {(place.pipeline, place.stage): known[gang[place.rank].node] for place in shape.places()},
    )


def summary(status: PlacementStatus) -> str:
    """Links that cross each level, the widest first: ``0/1/2``, with those between pipelines after a plus."""
    rings = any(item.between_pipelines for item in status.crossings)
    return "/".join(f"{item.count}{f'+{item.between_pipelines}' if rings else ''}" for item in status.crossings)


def strategy(job: Job, gang: Mapping[int, StagePod]) -> str:
    """How pods got their nodes: all, some, or none of them were pinned by a plan, or none was to be."""
    if job.spec.placement.strategy == DELEGATED:
        return DELEGATED
    pinned = [pod.opened is not None and bool(pod.opened.node) for pod in gang.values()]
    if all(pinned):
        return PLANNED
    return MIXED if any(pinned) else UNPLANNED
