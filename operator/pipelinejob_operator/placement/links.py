"""Which stages talk to each other, and what that costs for given hosts. Pure."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipelinejob_operator.placement.topology import Level, Path
from pipelinejob_operator.placement.tree import shared_depth


@dataclass(frozen=True, slots=True)
class Shape:
    """``pipelines`` chains of ``stages``; rank = pipeline * stages + stage.

    With ``rings`` equal stages exchange gradients; replicas that serve do not know of each other.
    """

    stages: int
    pipelines: int = 1
    rings: bool = True

    @property
    def ranks(self) -> int:
        """Number of pods."""
        return self.stages * self.pipelines

    @property
    def cut(self) -> int:
        """The fewest links that part any set of ranks from the others: those of one rank at the end of a chain."""
        if not self.rings and self.pipelines > 1:
            return 0
        return min(self.pipelines - 1, 2) + min(self.stages - 1, 1)

    def chain_links(self) -> Iterator[tuple[int, int]]:
        """Neighbouring stages: activations and gradients pass here once a microbatch."""
        for rank in range(self.ranks):
            if (rank + 1) % self.stages:
                yield rank, rank + 1

    def ring_links(self) -> Iterator[tuple[int, int]]:
        """Equal stages of neighbouring pipelines, and of the last and the first: gradients pass here once a step."""
        if self.pipelines < 2 or not self.rings:
            return
        for rank in range(self.ranks - self.stages):
            yield rank, rank + self.stages
        if self.pipelines > 2:
            for stage in range(self.stages):
                yield self.ranks - self.stages + stage, stage

    def neighbours(self) -> list[list[int]]:
        """Of each rank, the ranks that it has a link with."""
        linked: list[list[int]] = [[] for _ in range(self.ranks)]
        for links in (self.chain_links(), self.ring_links()):
            for one, other in links:
                linked[one].append(other)
                linked[other].append(one)
        return linked


@dataclass(frozen=True, slots=True)
class Crossings:
    """How many links cross a level, and no wider one."""

    level: str
    chain: int
    ring: int


@dataclass(frozen=True, slots=True)
class Measure:
    """What a placement costs. ``shared`` counts neighbouring stages of a chain that have one host."""

    cost: int
    crossings: tuple[Crossings, ...]
    shared: int


def measure(hosts: Sequence[Path], shape: Shape, levels: Sequence[Level]) -> Measure:
    """Cost of the placement that gives rank r the host ``hosts[r]``: the sum of its links' distances."""
    chain = Counter(shared_depth(hosts[one], hosts[other]) for one, other in shape.chain_links())
    ring = Counter(shared_depth(hosts[one], hosts[other]) for one, other in shape.ring_links())
    return Measure(
        cost=sum(level.weight * (chain[depth] + ring[depth]) for depth, level in enumerate(levels)),
        crossings=tuple(Crossings(level.label, chain[depth], ring[depth]) for depth, level in enumerate(levels)),
        shared=chain[len(levels)],
    )
