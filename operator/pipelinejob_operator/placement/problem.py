"""What is to be placed, with everything looked up that the planner asks again and again. Pure."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipelinejob_operator.placement import chain
from pipelinejob_operator.placement.fit import Demand, Node
from pipelinejob_operator.placement.links import Shape
from pipelinejob_operator.placement.packing import Ledger, Task
from pipelinejob_operator.placement.topology import Level, Path, TopologyError, path
from pipelinejob_operator.placement.tree import at_depth, build

Separation = Literal["Off", "Preferred", "Required"]
"""Whether neighbouring stages of a chain, which hold copies of each other's state, may share a host."""


@dataclass(frozen=True, slots=True)
class Problem:
    """``demands`` are by rank; ``admitted`` has the hosts of each different demand, full or not.

    All stages go into one domain of depth ``top``. Ranks of ``current`` may stay and give their room back; ranks of
    ``keep`` do stay, and their room is not in ``free``.
    """

    shape: Shape
    levels: tuple[Level, ...]
    demands: tuple[Demand, ...]
    free: Mapping[Path, Mapping[str, int]]
    admitted: Mapping[Demand, frozenset[Path]]
    top: int
    separation: Separation
    current: Mapping[int, Path]
    keep: Mapping[int, Path]

    @property
    def weights(self) -> list[int]:
        """The levels' weights, the widest first."""
        return [level.weight for level in self.levels]

    @property
    def equal(self) -> bool:
        """Whether any stage can take the place of any other."""
        return len(self.admitted) == 1

    def rooms(self, demand: Demand) -> dict[Path, int]:
        """How many stages of ``demand`` each host takes."""
        return {host: demand.room(self.free[host]) for host in self.admitted[demand]}

    def rooms_if_all(self, extreme: Callable[[Iterable[int]], int]) -> dict[Path, int]:
        """How many stages each host takes if all ask for the most (``max``) or the least (``min``) of each resource.

        With ``max``, hosts that all stages may use; with ``min``, hosts that any may.
        """
        asked = [dict(demand.requests) for demand in self.admitted]
        names = sorted({name for amounts in asked for name in amounts})
        counts = {name: extreme(amounts.get(name, 0) for amounts in asked) for name in names}
        one = Demand(tuple((name, count) for name, count in counts.items() if count > 0))
        hosts = list(self.admitted.values())
        every = frozenset.intersection(*hosts) if extreme is max else frozenset.union(*hosts)
        return {host: one.room(self.free[host]) for host in every}

    def ledger(self, domain: Path = ()) -> Ledger:
        """What is free on the hosts of ``domain``."""
        free = {host: amounts for host, amounts in self.free.items() if host[: len(domain)] == domain}
        return Ledger(free, {demand: hosts & free.keys() for demand, hosts in self.admitted.items()})

    def task(self, separation: Separation) -> Task:
        """The problem as the searches of ``packing.py`` take it."""
        apart: list[set[int]] = [set() for _ in range(self.shape.ranks)]
        if separation != "Off":
            for one, other in self.shape.chain_links():
                apart[one].add(other)
                apart[other].add(one)
        return Task(self.demands, self.shape.neighbours(), [frozenset(others) for others in apart], self.weights)

    def least(self) -> int:
        """A cost that no plan is below, whatever stays in place.

        All links together connect all stages, so they cost no less than the cheapest single chain through as many.
        With several pipelines, every set of stages has at least ``Shape.cut`` links to the others. A link has two ends,
        so a level of which n > 1 domains are used is crossed cut * n / 2 times or more, where a chain crosses it n - 1
        times; and n > 1 for every level narrower than the narrowest domain that holds all. Also, chains and rings have
        no link in common, so each pays for itself. Without rings only each chain is connected. Unequal
        stages count as if all were as small as the smallest.
        """
        root, shape = build(self.rooms_if_all(min)), self.shape
        whole, one_chain, one_ring = (
            chain.least_cost(root, size, self.weights, top=self.top) or 0
            for size in (shape.ranks, shape.stages, shape.pipelines)
        )
        if shape.pipelines == 1 or whole == 0:
            return whole
        if not shape.rings:
            return shape.pipelines * one_chain
        narrowest = max(
            depth
            for depth in range(self.top, len(self.weights))
            if any(domain.room >= shape.ranks for domain in at_depth(root, depth))
        )
        by_cuts = -(-shape.cut * (whole + self.weights[narrowest]) // 2)
        return max(whole, by_cuts, shape.pipelines * one_chain + shape.stages * one_ring)


def state(
    nodes: Sequence[Node],
    levels: Sequence[Level],
    demands: Sequence[Demand],
    *,
    pipelines: int,
    rings: bool = True,
    required_level: str,
    separation: Separation,
    current: Mapping[int, str],
    keep: Mapping[int, str],
) -> Problem:
    """The problem that ``planner.plan`` is given. Raises what it raises."""
    if not demands or pipelines < 1 or len(demands) % pipelines:
        raise ValueError(f"{len(demands)} demands do not make {pipelines} pipelines of equal length")
    labels = [level.label for level in levels]
    if required_level and required_level not in labels:
        raise TopologyError(
            f"spec.placement.requiredLevel: Unsupported value: {required_level!r}; allowed: {', '.join(labels)}"
        )
    hosts = {node.name: path(node, levels) for node in nodes}
    for rank, name in keep.items():
        if not 0 <= rank < len(demands) or name not in hosts:
            raise ValueError(f"rank {rank} is to stay on node {name}: no such rank or no such node")
    admitted = {
        demand: frozenset(hosts[node.name] for node in nodes if demand.refusal(node) is None)
        for demand in dict.fromkeys(demands)
    }
    return Problem(
        Shape(len(demands) // pipelines, pipelines, rings),
        tuple(levels),
        tuple(demands),
        {hosts[node.name]: node.free for node in nodes},
        admitted,
        labels.index(required_level) + 1 if required_level else 0,
        separation,
        {
            rank: hosts[name]
            for rank, name in sorted(current.items())
            if rank < len(demands) and rank not in keep and hosts.get(name) in admitted[demands[rank]]
        },
        {rank: hosts[name] for rank, name in sorted(keep.items())},
    )
