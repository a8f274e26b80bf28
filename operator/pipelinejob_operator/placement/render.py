"""A placement as text: the chain drawn over the tree. Pure."""

from collections.abc import Iterator, Sequence

from pipelinejob_operator.placement.fit import Node
from pipelinejob_operator.placement.links import Shape
from pipelinejob_operator.placement.planner import cost_of
from pipelinejob_operator.placement.topology import Level, Path, path
from pipelinejob_operator.placement.tree import distance


def draw(nodes: Sequence[Node], levels: Sequence[Level], names: Sequence[str], shape: Shape) -> str:
    """The tree of used domains with the stages on each host, then the links that leave a host, then the sums.

    ``names[r]`` is the node of rank r = pipeline * stages + stage. Stages of pipeline k > 0 are written k/stage.
    """
    used = set(names)
    hosts = {node.name: path(node, levels) for node in nodes if node.name in used}
    placed = [hosts[name] for name in names]
    result = cost_of(nodes, levels, names, shape.pipelines, rings=shape.rings)
    lines = [*_tree(placed, shape, levels), "", *_chains(placed, shape, levels), ""]
    width = max(len(item.level) for item in result.crossings)
    for item, level in zip(result.crossings, levels, strict=True):
        rings = f"  between pipelines {item.ring}" if shape.pipelines > 1 and shape.rings else ""
        lines.append(f"{item.level:<{width}}  weight {level.weight}  crossed {item.chain}{rings}")
    return "\n".join([*lines, f"cost {result.cost}"])


def _tree(placed: Sequence[Path], shape: Shape, levels: Sequence[Level]) -> Iterator[str]:
    """Domains by the first stage in them."""
    ranks: dict[Path, list[int]] = {}
    for rank, host in enumerate(placed):
        for depth in range(len(host) + 1):
            ranks.setdefault(host[:depth], []).append(rank)

    def below(domain: Path, stem: str) -> Iterator[str]:
        inside = sorted((item for item in ranks if item and item[:-1] == domain), key=lambda item: ranks[item][0])
        for index, item in enumerate(inside):
            last = index == len(inside) - 1
            stages = f"  stages {_ranges(ranks[item], shape)}" if len(item) == len(levels) else ""
            yield f"{stem}{'└─ ' if last else '├─ '}{item[-1]}{stages}"
            yield from below(item, stem + ("   " if last else "│  "))

    yield " > ".join(level.label for level in levels)
    yield from below((), "")


def _chains(placed: Sequence[Path], shape: Shape, levels: Sequence[Level]) -> Iterator[str]:
    """Each pipeline in a line: hosts, and between them one more dash for each level that a link goes up."""
    for first in range(0, shape.ranks, shape.stages):
        line = f"pipeline {first // shape.stages}: " if shape.pipelines > 1 else ""
        start = first
        for rank in range(first, first + shape.stages):
            if rank + 1 < first + shape.stages and placed[rank + 1] == placed[rank]:
                continue
            line += f"{placed[rank][-1]}[{_range(start % shape.stages, rank % shape.stages)}]"
            if rank + 1 < first + shape.stages:
                line += f" {_link(placed[rank], placed[rank + 1], levels)} "
            start = rank + 1
        yield line


def _link(one: Path, other: Path, levels: Sequence[Level]) -> str:
    weight = distance(one, other, range(len(levels)))
    return "-" * (len(levels) - weight)


def _ranges(ranks: Sequence[int], shape: Shape) -> str:
    parts: list[tuple[int, int]] = []
    for rank in ranks:
        if parts and parts[-1][1] == rank - 1 and rank % shape.stages:
            parts[-1] = (parts[-1][0], rank)
        else:
            parts.append((rank, rank))
    return ", ".join(
        (f"{first // shape.stages}/" if shape.pipelines > 1 else "") + _range(first % shape.stages, last % shape.stages)
        for first, last in parts
    )


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
