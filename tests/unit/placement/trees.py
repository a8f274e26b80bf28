"""Random small clusters, and the best placement found by trying all: what the planner is compared with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from pipelinejob_operator.placement.fit import Demand, Node
from pipelinejob_operator.placement.topology import Level, levels

SMALL = Demand((("gpu", 1), ("pods", 1)))


@dataclass(frozen=True)
class Cluster:
    nodes: tuple[Node, ...]
    levels: tuple[Level, ...]

    def distance(self, one: str, other: str) -> int:
        """The weight of the widest level whose domain differs."""
        labels = {node.name: node.labels for node in self.nodes}
        for level in self.levels[:-1]:
            if labels[one][level.label] != labels[other][level.label]:
                return level.weight
        return self.levels[-1].weight if one != other else 0


def node(name: str, gpus: int, labels: Mapping[str, str] | None = None, **free: int) -> Node:
    return Node(name, labels or {}, {"gpu": gpus, "pods": 110, **free})


def random_cluster(random: Random, hosts: int = 6, room: int = 3, **resources: int) -> Cluster:
    """Up to ``hosts`` nodes in a tree of one to three levels, with small weights so that ties and near ties abound."""
    depth = random.randint(0, 2)
    nodes = []
    for number in range(random.randint(1, hosts)):
        labels, path = {}, ""
        for level in range(depth):
            path += str(random.randint(0, 1 + level % 2))
            labels[f"level-{level}"] = f"d{path}"
        free = {name: random.randint(0, most) for name, most in resources.items()}
        nodes.append(node(f"n{number}", random.randint(0, room), labels, **free))
    weights = sorted((random.choice([1, 1, 2, 3, 5, 10, 100]) for _ in range(depth + 1)), reverse=True)
    return Cluster(tuple(nodes), levels([f"level-{level}" for level in range(depth)], weights))


def links(stages: int, pipelines: int = 1, rings: bool = True) -> list[tuple[int, int]]:
    """Neighbours in each chain, and with rings one through each stage of all pipelines."""
    chains = [(p * stages + s, p * stages + s + 1) for p in range(pipelines) for s in range(stages - 1)]
    pairs = {frozenset((p, (p + 1) % pipelines)) for p in range(pipelines) if pipelines > 1 and rings}
    around = [tuple(p * stages + s for p in sorted(pair)) for pair in pairs for s in range(stages)]
    return chains + around


def cost(cluster: Cluster, names: Sequence[str], pipelines: int = 1, rings: bool = True) -> int:
    pairs = links(len(names) // pipelines, pipelines, rings)
    return sum(cluster.distance(names[one], names[two]) for one, two in pairs)


def best(
    cluster: Cluster,
    demands: Sequence[Demand],
    *,
    pipelines: int = 1,
    rings: bool = True,
    apart: bool = False,
    fixed: Mapping[int, str] | None = None,
    current: Mapping[int, str] | None = None,
    within: str = "",
) -> tuple[int, int] | None:
    """The least (cost, moves) over all placements, or None if there is none. ``fixed`` ranks need no room."""
    fixed, current = fixed or {}, current or {}
    near: list[list[int]] = [[] for _ in demands]
    for one, two in links(len(demands) // pipelines, pipelines, rings):
        near[max(one, two)].append(min(one, two))
    free = {item.name: dict(item.free) for item in cluster.nodes}
    domain = {item.name: item.labels.get(within, item.name) if within else "" for item in cluster.nodes}
    placed: list[str] = []
    found: tuple[int, int] | None = None

    def place(spent: int, moves: int) -> None:
        nonlocal found
        if found is not None and (spent, moves) >= found:
            return
        rank = len(placed)
        if rank == len(demands):
            found = (spent, moves)
            return
        for name in [fixed[rank]] if rank in fixed else free:
            amounts = demands[rank].requests if rank not in fixed else ()
            if any(free[name].get(key, 0) < count for key, count in amounts):
                continue
            if placed and (
                domain[name] != domain[placed[0]] or (apart and rank - 1 in near[rank] and placed[-1] == name)
            ):
                continue
            for key, count in amounts:
                free[name][key] -= count
            placed.append(name)
            more = sum(cluster.distance(name, placed[other]) for other in near[rank])
            place(spent + more, moves + (current.get(rank, name) != name))
            placed.pop()
            for key, count in amounts:
                free[name][key] += count

    place(0, 0)
    return found


def assert_fits(cluster: Cluster, demands: Sequence[Demand], names: Sequence[str]) -> None:
    """No node holds more than it has free."""
    free = {item.name: dict(item.free) for item in cluster.nodes}
    for demand, name in zip(demands, names, strict=True):
        for key, count in demand.requests:
            free[name][key] -= count
            assert free[name][key] >= 0, (name, key, names)
