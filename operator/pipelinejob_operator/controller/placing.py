"""Placing: which gang gets nodes next, and which nodes. Pure.

Gangs take turns: first those that run and lack a stage, then by priority, then by the age of the job. Who is behind may
overtake who waits only with what the one ahead does not need: the first gang that fits the cluster, but not what is
free of it, has the nodes of its cheapest plan *reserved*. Nobody behind it gets anything of what is free there, so
however many small jobs come, the room that ended jobs give back adds up for the large one.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from pipelinejob_operator.build.place import Shape
from pipelinejob_operator.placement.fit import Demand, Node, available
from pipelinejob_operator.placement.planner import Infeasible, Plan, Separation, plan
from pipelinejob_operator.placement.topology import Level

Amounts = Mapping[str, int]


@dataclass(frozen=True)
class Request:
    """A gang, or the missing stages of one, that asks for nodes. ``demands`` and ``pods`` are by rank."""

    job: str
    uid: str
    shape: Shape
    demands: tuple[Demand, ...]
    pods: Mapping[int, str] = field(default_factory=dict)
    """UIDs of the pods that are to get a node."""
    priority: int = 0
    created: datetime = datetime.max
    keep: Mapping[int, str] = field(default_factory=dict)
    """Nodes of ranks that have one and stay there."""
    current: Mapping[int, str] = field(default_factory=dict)
    """Nodes that ranks had before: to be preferred among equal plans."""
    levels: tuple[Level, ...] = ()
    rings: bool = True
    """Whether equal stages of the pipelines talk to each other."""
    required_level: str = ""
    separation: Separation = "Off"

    @property
    def kind(self) -> tuple[object, ...]:
        """Two gangs of one kind fit on the same nodes, or both do not."""
        return self.shape, self.demands, self.levels, self.required_level, self.separation, tuple(self.keep.items())

    @property
    def turn(self) -> tuple[bool, int, datetime, str]:
        """Gangs are served by this, the smallest first."""
        return not self.keep, -self.priority, self.created, self.job


@dataclass(frozen=True)
class Cluster:
    """What there is: nodes with what is free now, and what stage pods hold of each, which their jobs give back."""

    nodes: tuple[Node, ...]
    held: Mapping[str, Amounts] = field(default_factory=dict)

    def emptied(self) -> tuple[Node, ...]:
        """The nodes as they will be when every job has ended."""
        return tuple(
            replace(node, free=_sum(node.free, self.held[node.name])) if node.name in self.held else node
            for node in self.nodes
        )


@dataclass(frozen=True)
class Outcome:
    """What is known of a gang after its turn: a plan, or why none, and then what is reserved for it."""

    plan: Plan | Infeasible
    reserved: tuple[str, ...] = ()
    """Nodes by rank, where the cluster could hold the gang; empty where it could not, or where a plan was found."""


@dataclass(frozen=True)
class Decision:
    """The outcome for the gang that was asked about, and for those ahead of it."""

    mine: Outcome
    ahead: Mapping[str, Outcome]
    """By the job's UID."""
    behind: str = ""
    """The job for which nodes are reserved that could have served this one; empty where that made no difference."""


def solve(request: Request, nodes: Sequence[Node]) -> Plan | Infeasible:
    """Place what a request asks for on what ``nodes`` have free."""
    return plan(
        nodes,
        request.levels,
        request.demands,
        pipelines=request.shape.pipelines,
        rings=request.rings,
        required_level=request.required_level,
        separation=request.separation,
        current=request.current,
        keep=request.keep,
    )


def hopeless(request: Request, nodes: Sequence[Node]) -> str:
    """Why ``nodes``, of which nothing is taken, cannot hold a gang, and the cure; empty where they can."""
    found = solve(request, nodes)
    if not isinstance(found, Infeasible):
        return ""
    return f"{found.message}; that is so even if nothing else runs, so no pod is made before nodes are added or changed"


def decide(request: Request, ahead: Sequence[Request], known: Mapping[str, Outcome], cluster: Cluster) -> Decision:
    """Give a gang its turn, after those ``ahead`` of it.

    ``known`` has the outcomes, by UID, of gangs that found no plan and would not find one now either. Who ahead fits
    gets its nodes counted as taken, because its own turn comes at once; of the others the first that the emptied
    cluster could hold has its nodes reserved.
    """
    nodes, outcomes, reserving = cluster.nodes, dict[str, Outcome](), ""
    unplaced: dict[tuple[object, ...], Infeasible] = {}

    def attempt(one: Request) -> Plan | Infeasible:
        """Plan, unless one like it has found nothing: what is free only shrinks from turn to turn."""
        found = unplaced.get(one.kind) or solve(one, nodes)
        if isinstance(found, Infeasible):
            unplaced[one.kind] = found
        return found

    for other in ahead:
        outcome = known.get(other.uid) or Outcome(attempt(other))
        if isinstance(outcome.plan, Plan):
            nodes = less(nodes, other, outcome.plan.nodes)
        else:
            unplaced[other.kind] = outcome.plan
            if not reserving:
                outcome = _with_reservation(other, outcome, cluster)
            if outcome.reserved and not reserving:
                nodes, reserving = less(nodes, other, outcome.reserved), other.job
        outcomes[other.uid] = outcome
    mine = attempt(request)
    behind = ""
    if isinstance(mine, Infeasible) and reserving and not isinstance(solve(request, cluster.nodes), Infeasible):
        behind = reserving
    return Decision(Outcome(mine), outcomes, behind)


def _with_reservation(request: Request, outcome: Outcome, cluster: Cluster) -> Outcome:
    """Reserve the cheapest plan on the emptied cluster; as it was before, if that is as cheap.

    A gang that runs and lacks a stage has no reservation: it goes first, and its own stages are among what is emptied.
    """
    if request.keep:
        return outcome
    before = dict(enumerate(outcome.reserved)) or request.current
    found = solve(replace(request, current=before), cluster.emptied())
    return Outcome(outcome.plan, found.nodes if isinstance(found, Plan) else ())


def less(nodes: Sequence[Node], request: Request, names: Sequence[str]) -> tuple[Node, ...]:
    """``nodes`` without what a request takes when rank r goes to the node ``names[r]``; never below nothing."""
    taken: dict[str, Counter[str]] = {}
    for rank, (demand, name) in enumerate(zip(request.demands, names, strict=True)):
        if rank not in request.keep:
            taken.setdefault(name, Counter()).update(dict(demand.requests))
    return tuple(
        replace(node, free={**node.free, **_rest(node.free, taken[node.name])}) if node.name in taken else node
        for node in nodes
    )


def _rest(free: Amounts, taken: Amounts) -> dict[str, int]:
    return {name: max(0, available(free, name) - count) for name, count in taken.items()}


def _sum(one: Amounts, other: Amounts) -> dict[str, int]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in one.keys() | other.keys()}
