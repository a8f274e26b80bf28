"""Which node each stage runs on, and why: the entry to placement. Pure and deterministic."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipelinejob_operator.placement import drafts
from pipelinejob_operator.placement.explain import Infeasible, explain
from pipelinejob_operator.placement.fit import Demand, Node
from pipelinejob_operator.placement.links import Crossings, Measure, Shape, measure
from pipelinejob_operator.placement.problem import Problem, Separation, state
from pipelinejob_operator.placement.topology import Level, path

__all__ = ["Infeasible", "Plan", "Separation", "cost_of", "plan"]


@dataclass(frozen=True, slots=True)
class Plan:
    """Where every stage runs.

    ``nodes[rank]`` is a node's name. ``cost`` is the sum, over all links, of the weight of the widest level that the
    link crosses; ``crossings`` counts them. No plan costs less than ``least``; None where stages were kept in place.
    ``shared`` counts neighbouring stages of a chain on one host, ``moved`` has the ranks that leave their node.
    """

    nodes: tuple[str, ...]
    cost: int
    least: int | None
    crossings: tuple[Crossings, ...]
    shared: int
    moved: tuple[int, ...]

    @property
    def message(self) -> str:
        """The plan in one line."""
        rings = any(item.ring for item in self.crossings)
        counts = ", ".join(f"{item.level} {item.chain}{f'+{item.ring}' if rings else ''}" for item in self.crossings)
        parts = [
            f"{len(self.nodes)} stages on {len(set(self.nodes))} nodes",
            f"links{' of chains+rings' if rings else ''} that cross {counts}",
        ]
        if self.least is not None:
            parts.append(
                "no plan costs less" if self.cost == self.least else f"cost {self.cost}, at least {self.least}"
            )
        return "; ".join([*parts, *([f"{len(self.moved)} stages move"] if self.moved else [])])


def plan(
    nodes: Sequence[Node],
    levels: Sequence[Level],
    demands: Sequence[Demand],
    *,
    pipelines: int = 1,
    rings: bool = True,
    required_level: str = "",
    separation: Separation = "Off",
    current: Mapping[int, str] | None = None,
    keep: Mapping[int, str] | None = None,
) -> Plan | Infeasible:
    """The cheapest placement that is found for ``pipelines`` chains of equal length; ``demands`` are by rank.

    ``rings``: equal stages of the chains talk to each other. ``required_level``: all stages lie in one domain of it.
    ``current``: nodes of ranks that may move but had better not; their pods are not counted in ``nodes``. ``keep``:
    nodes of ranks that do not move; their pods are counted. ``separation``: neighbouring stages of a chain never
    share a host (Required), or not if that is possible (Preferred). Least cost comes first, then fewest moves.

    For one chain of equal demands the cost is the least possible. All else is a heuristic, whose bounds are in
    docs/explanation/placement.md; ``Plan.least`` says how far from the best it can be. Raises TopologyError for an
    unknown level, and ValueError for ranks or nodes that do not exist.
    """
    problem = state(
        nodes,
        levels,
        demands,
        pipelines=pipelines,
        rings=rings,
        required_level=required_level,
        separation=separation,
        current=current or {},
        keep=keep or {},
    )
    staying = _shared_by_kept(problem)
    found = [(measure(hosts, problem.shape, problem.levels), hosts) for hosts in _found(problem)]
    if separation == "Required":
        found = [(result, hosts) for result, hosts in found if result.shared <= staying]
    if not found:
        return explain(nodes, problem)

    def rank(item: tuple[Measure, drafts.Hosts]) -> tuple[int, int, int, drafts.Hosts]:
        result, hosts = item
        moves = sum(hosts[rank] != host for rank, host in problem.current.items())
        return 0 if separation == "Off" else result.shared, result.cost, moves, hosts

    result, hosts = min(found, key=rank)
    exact = problem.equal and problem.shape.pipelines == 1
    return Plan(
        nodes=tuple(host[-1] for host in hosts),
        cost=result.cost,
        least=None if problem.keep else result.cost if exact else problem.least(),
        crossings=result.crossings,
        shared=result.shared,
        moved=tuple(rank for rank, host in problem.current.items() if hosts[rank] != host),
    )


def cost_of(
    nodes: Sequence[Node], levels: Sequence[Level], names: Sequence[str], pipelines: int = 1, *, rings: bool = True
) -> Measure:
    """What a placement costs that gives rank r the node ``names[r]``, whoever made it."""
    hosts = {node.name: path(node, levels) for node in nodes}
    return measure([hosts[name] for name in names], Shape(len(names) // pipelines, pipelines, rings), levels)


def _found(problem: Problem) -> Iterator[drafts.Hosts]:
    """All drafts with neighbours apart where that is asked for; those without only if it is preferred and fails."""
    apart: list[drafts.Hosts] = []
    if problem.separation != "Off":
        apart = list(_drafts(problem, "Required"))
        yield from apart
    if not apart and problem.separation != "Required":
        yield from _drafts(problem, "Off")


def _drafts(problem: Problem, separation: Separation) -> Iterator[drafts.Hosts]:
    for pinned in ({**problem.keep, **problem.current}, problem.keep):
        hosts = drafts.around(problem, pinned, separation) if pinned else None
        if hosts is not None:
            yield hosts
    if not problem.keep:
        yield from drafts.fresh(problem, separation)


def _shared_by_kept(problem: Problem) -> int:
    keep = problem.keep
    return sum(one in keep and keep[one] == keep.get(other) for one, other in problem.shape.chain_links())
