"""The tree of domains with hosts as leaves. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from pipelinejob_operator.placement.topology import Path


@dataclass(slots=True, eq=False)
class Domain:
    """A domain, the whole cluster (empty path) or a host (no children); ``room`` is how many stages fit inside."""

    path: Path
    room: int = 0
    children: list["Domain"] = field(default_factory=list)

    @property
    def depth(self) -> int:
        """0 for the cluster, 1 for a domain of the widest level."""
        return len(self.path)


def build(rooms: Mapping[Path, int]) -> Domain:
    """The tree over the hosts of ``rooms`` that have room, children by name."""
    root = Domain(())
    known: dict[Path, Domain] = {(): root}
    for path in sorted(rooms):
        if rooms[path] < 1:
            continue
        parent = root
        parent.room += rooms[path]
        for depth in range(1, len(path) + 1):
            prefix = path[:depth]
            domain = known.get(prefix)
            if domain is None:
                domain = known[prefix] = Domain(prefix)
                parent.children.append(domain)
            domain.room += rooms[path]
            parent = domain
    return root


def at_depth(root: Domain, depth: int) -> Iterator[Domain]:
    """The domains of one level."""
    if root.depth == depth:
        yield root
        return
    for child in root.children:
        yield from at_depth(child, depth)


def ranked(root: Domain, depth: int, size: int, weights: Sequence[int]) -> list[tuple[int, Domain]]:
    """The domains of one level with room for ``size`` stages, most promising first, each with a bound.

    No chain of ``size`` stages inside costs less than the bound. With N(d) used domains of depth d, a chain costs the
    sum of (w(d - 1) - w(d)) * (N(d) - 1), the last w being 0; and N(d) is no less than the number of the roomiest
    domains that hold ``size`` together.
    """
    found = []
    for domain in at_depth(root, depth):
        if domain.room >= size:
            fewest = [_fewest(domain, below, size) - 1 for below in range(depth + 1, len(weights) + 1)]
            falls = [weight - lower for weight, lower in zip(weights, [*weights[1:], 0], strict=True)][depth:]
            found.append((sum(fall * count for fall, count in zip(falls, fewest, strict=True)), domain))
    return sorted(found, key=lambda item: (item[0], item[1].room, item[1].path))


def _fewest(domain: Domain, depth: int, size: int) -> int:
    rooms = sorted((inside.room for inside in at_depth(domain, depth)), reverse=True)
    return next(count for count, total in enumerate(accumulate(rooms), start=1) if total >= size)


def shared_depth(one: Path, other: Path) -> int:
    """How many levels two hosts share; the length of the paths if they are the same host."""
    for depth, (left, right) in enumerate(zip(one, other, strict=True)):
        if left != right:
            return depth
    return len(one)


def distance(one: Path, other: Path, weights: Sequence[int]) -> int:
    """Cost of a link: the weight of the widest level that it crosses, 0 within a host."""
    depth = shared_depth(one, other)
    return weights[depth] if depth < len(one) else 0
