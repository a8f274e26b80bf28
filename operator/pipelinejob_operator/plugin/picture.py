"""What ``draw`` prints: a job's chain over the tree of the nodes, where it is or where a plan would put it. Pure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelinejob_operator.build.installation import Installation
from pipelinejob_operator.build.job import Job
from pipelinejob_operator.build.names import JOB_UID_LABEL, SPARE_LABEL, STAGE_LABEL
from pipelinejob_operator.build.pods import stage_pod
from pipelinejob_operator.controller.observed import Gang, Observed
from pipelinejob_operator.placement import planner, render
from pipelinejob_operator.placement.fit import demand
from pipelinejob_operator.placement.links import Shape
from pipelinejob_operator.placement.pods import holds_room
from pipelinejob_operator.placement.topology import Level, choose_labels, levels, read_nodes
from pipelinejob_operator.policy.facts import StagePod
from pipelinejob_operator.policy.reasons import ConditionType

Manifest = dict[str, Any]

ANY_INSTALLATION = Installation(worker_image="worker")
"""What the chart decides makes no difference to what a pod asks of its node."""


@dataclass(frozen=True)
class Cluster:
    """Nodes and pods as the API server shows them, and the labels to use where a job names none."""

    nodes: Sequence[Manifest]
    pods: Sequence[Manifest]
    labels: Sequence[str] = ()

    def tree(self, job: Job) -> tuple[Level, ...]:
        """The levels for a job. Raises TopologyError where they cannot be used."""
        known = read_nodes(self.nodes, ())
        return levels(choose_labels(job.spec.placement.topology_levels, self.labels, known))


@dataclass(frozen=True)
class Picture:
    """Text to print, and whether every stage has a place in it."""

    text: str
    complete: bool


def planned(job: Job, cluster: Cluster) -> Picture:
    """Draw where a plan made now would put the stages of a job, whose own pods count for nothing."""
    return _drawn(cluster, job, _plan(job, cluster))


def running(job: Job, cluster: Cluster) -> Picture:
    """Draw where the stages of a job are, and what a plan made now would cost instead."""
    tree = cluster.tree(job)
    own = [StagePod.read(pod) for pod in cluster.pods if holds_room(pod) and _is_stage(job, pod)]
    gang = Gang.of(job, Observed(own))
    places, pods = gang.shape.places(), gang.current
    if missing := [place for place in places if place.rank not in pods or not pods[place.rank].node]:
        some = f", such as {missing[0]}" if len(missing) < len(places) else ""
        told = next((f": {item.message}" for item in job.status.conditions if item.type == ConditionType.PLACED), "")
        plan = planned(job, cluster)
        heading = f"{len(missing)} of {len(places)} stages have no node{some}{told}"
        return Picture(f"{heading}\n\nA plan made now:\n\n{plan.text}", False)
    names = [pods[place.rank].node for place in places]
    nodes = read_nodes(cluster.nodes, ())
    text = render.draw(nodes, tree, names, Shape(gang.shape.stages, gang.shape.pipelines, job.rings))
    if gang.shape != job.shape:
        return Picture(f"{text}\n\nThese are {gang.shape}; {job.shape} are on their way", True)
    cost = planner.cost_of(nodes, tree, names, gang.shape.pipelines, rings=job.rings).cost
    return Picture(f"{text}\n\n{_compared(cost, _plan(job, cluster))}", True)


def _compared(cost: int, fresh: planner.Plan | planner.Infeasible) -> str:
    if isinstance(fresh, planner.Infeasible):
        return f"A plan made now would find no place: {fresh.message}"
    if fresh.cost < cost:
        return f"A plan made now would cost {fresh.cost}: {fresh.message}"
    return f"A plan made now would cost {fresh.cost}, no less"


def _plan(job: Job, cluster: Cluster) -> planner.Plan | planner.Infeasible:
    placement = job.spec.placement
    pods = (stage_pod(job, place, ANY_INSTALLATION, share_host=False) for place in job.shape.places())
    return planner.plan(
        read_nodes(cluster.nodes, cluster.pods, _others(job)),
        cluster.tree(job),
        [demand(pod) for pod in pods],
        pipelines=job.spec.pipelines,
        rings=job.rings,
        required_level=placement.required_level,
        separation=placement.separation,
    )


def _drawn(cluster: Cluster, job: Job, found: planner.Plan | planner.Infeasible) -> Picture:
    if isinstance(found, planner.Infeasible):
        return Picture(f"No place for {job.shape}: {found.message}", False)
    nodes = read_nodes(cluster.nodes, ())
    text = render.draw(nodes, cluster.tree(job), found.nodes, Shape(job.spec.stages, job.spec.pipelines, job.rings))
    return Picture(f"{text}\n{found.message}", True)


def _others(job: Job) -> Callable[[Mapping[str, Any]], bool]:
    """Whether a pod takes room that a plan for the job cannot have."""
    return lambda pod: holds_room(pod) and not _is_stage(job, pod)


def _is_stage(job: Job, pod: Mapping[str, Any]) -> bool:
    """Whether a pod is a stage of the job: its fronts and spares are not."""
    labels = pod["metadata"].get("labels") or {}
    return labels.get(JOB_UID_LABEL) == job.uid and STAGE_LABEL in labels and SPARE_LABEL not in labels
