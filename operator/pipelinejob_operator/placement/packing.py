"""Chains of unequal stages, and stages with neighbours anywhere: heuristics. Pure.

To decide whether unequal stages fit at all is bin packing, so what is found here may be dearer than need be, and may be
nothing although there is a way. ``planner.py`` says what bound holds.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from pipelinejob_operator.placement.fit import Demand, available
from pipelinejob_operator.placement.topology import Path
from pipelinejob_operator.placement.tree import Domain, at_depth, distance


class Ledger:
    """What is free on each host while stages are put on it."""

    def __init__(self, free: Mapping[Path, Mapping[str, int]], admitted: Mapping[Demand, frozenset[Path]]) -> None:
        self._admitted = admitted
        names = sorted({name for demand in admitted for name, _ in demand.requests})
        self.free = {host: {name: available(amounts, name) for name in names} for host, amounts in free.items()}

    def fits(self, host: Path, demand: Demand) -> bool:
        """Whether one more such stage may be put on ``host``."""
        free = self.free[host]
        return host in self._admitted[demand] and all(free[name] >= count for name, count in demand.requests)

    def take(self, host: Path, demand: Demand) -> None:
        """Put a stage on ``host``; it must fit."""
        self._add(host, demand, -1)

    def give(self, host: Path, demand: Demand) -> None:
        """Take a stage away from ``host``."""
        self._add(host, demand, 1)

    def hosts(self, demand: Demand) -> list[Path]:
        """Hosts that one more such stage fits on, by path."""
        return sorted(host for host in self._admitted[demand] if self.fits(host, demand))

    def kind(self, host: Path) -> tuple[object, ...]:
        """Equal for hosts that are interchangeable but for where they stand."""
        return (*self.free[host].values(), *(host in hosts for hosts in self._admitted.values()))

    def _add(self, host: Path, demand: Demand, sign: int) -> None:
        for name, count in demand.requests:
            self.free[host][name] += sign * count


class Packing:
    """Pieces of a chain laid into domains, the longest first: each host takes as many next stages as fit.

    The chain is never interrupted inside a domain, so the cost is that of a walk through the used hosts.
    """

    def __init__(self, ledger: Ledger, demands: Sequence[Demand], weights: Sequence[int]) -> None:
        self._ledger = ledger
        self._demands = demands
        self._weights = weights
        self._runs: dict[tuple[tuple[object, ...], int], int] = {}
        self._kinds = {host: ledger.kind(host) for host in ledger.free}
        self._found: dict[tuple[Path, int], tuple[int, int, list[Path]]] = {}

    def best(self, root: Domain, top: int) -> list[Path] | None:
        """Hosts for all stages inside one domain of depth ``top``: of the narrowest domains that do, the cheapest."""
        for depth in range(len(self._weights), top - 1, -1):
            tried = [self.reach(domain, 0) for domain in at_depth(root, depth)]
            complete = [(cost, hosts) for end, cost, hosts in tried if end == len(self._demands)]
            if complete:
                return min(complete)[1]
        return None

    def reach(self, domain: Domain, start: int) -> tuple[int, int, list[Path]]:
        """How far ``domain`` takes the chain from stage ``start`` on: the end, the cost, and the hosts."""
        known = self._found.get((domain.path, start))
        if known is None:
            known = self._found[domain.path, start] = (
                self._nest(domain, start) if domain.children else self._fill(domain.path, start)
            )
        return known

    def _nest(self, domain: Domain, start: int) -> tuple[int, int, list[Path]]:
        spare = list(domain.children)
        end, cost = start, 0
        hosts: list[Path] = []
        while spare and end < len(self._demands):
            tried = [(self.reach(child, end), child) for child in spare]
            (reached, inside, used), child = min(tried, key=lambda item: (-item[0][0], item[0][1], item[1].path))
            if reached == end:
                break
            cost += inside + (self._weights[domain.depth] if hosts else 0)
            hosts = hosts + used
            end = reached
            spare.remove(child)
        return end, cost, hosts

    def _fill(self, host: Path, start: int) -> tuple[int, int, list[Path]]:
        key = (self._kinds[host], start)
        end = self._runs.get(key)
        if end is None:
            end = start
            while end < len(self._demands) and self._ledger.fits(host, self._demands[end]):
                self._ledger.take(host, self._demands[end])
                end += 1
            for demand in self._demands[start:end]:
                self._ledger.give(host, demand)
            self._runs[key] = end
        return end, 0, [host] * (end - start)


@dataclass(frozen=True, slots=True)
class Task:
    """What the search below is about: by rank the demand, the linked ranks, and those that must have another host."""

    demands: Sequence[Demand]
    neighbours: Sequence[Sequence[int]]
    apart: Sequence[frozenset[int]]
    weights: Sequence[int]


def one_by_one(task: Task, ranks: Iterable[int], placed: dict[int, Path], ledger: Ledger) -> bool:
    """Put each of ``ranks`` where the links to what is ``placed`` cost least, the fullest such host first.

    Adds to ``placed`` and takes from ``ledger``; False at the first rank that fits nowhere.
    """
    for rank in ranks:
        demand = task.demands[rank]
        linked = [placed[other] for other in task.neighbours[rank] if other in placed]
        shunned = {placed[other] for other in task.apart[rank] if other in placed}
        options = [
            (sum(distance(host, near, task.weights) for near in linked), demand.room(ledger.free[host]), host)
            for host in ledger.hosts(demand)
            if host not in shunned
        ]
        if not options:
            return False
        _, _, placed[rank] = min(options)
        ledger.take(placed[rank], demand)
    return True


class Exchange:
    """A plan that is bettered step by step: a rank moves to a neighbour's host, or changes places with a rank there."""

    def __init__(self, task: Task, hosts: Sequence[Path], ledger: Ledger) -> None:
        self.hosts = list(hosts)
        self._task = task
        self._ledger = ledger
        self._ranks: dict[Path, set[int]] = {host: set() for host in hosts}
        for rank, host in enumerate(self.hosts):
            ledger.take(host, task.demands[rank])
            self._ranks[host].add(rank)

    def improve(self, trials: int) -> None:
        """Take every step that lowers the cost, until there is none or ``trials`` changes have been looked at.

        Ranks that must be apart are never brought together.
        """
        better = True
        while better:
            better = False
            for rank in range(len(self.hosts)):
                for near in self._task.neighbours[rank]:
                    host = self.hosts[near]
                    if host == self.hosts[rank]:
                        continue
                    better |= self._move(rank, host)
                    for other in sorted(self._ranks[host]):
                        trials -= 1
                        better |= self._swap(rank, other)
                    if trials < 0:
                        return

    def _move(self, rank: int, there: Path) -> bool:
        here, demand = self.hosts[rank], self._task.demands[rank]
        gains = there != here and self._cost(rank, there) < self._cost(rank, here)
        if not gains or self._clash(rank, there) or not self._ledger.fits(there, demand):
            return False
        self._ledger.give(here, demand)
        self._ledger.take(there, demand)
        self._put(rank, there)
        return True

    def _swap(self, one: int, two: int) -> bool:
        here, there = self.hosts[one], self.hosts[two]
        if here == there or self._cost(one, here) + self._cost(two, there) <= (
            self._cost(one, there, {two: here}) + self._cost(two, here, {one: there})
        ):
            return False
        if self._clash(one, there, two) or self._clash(two, here, one):
            return False
        demands, ledger = self._task.demands, self._ledger
        ledger.give(here, demands[one])
        ledger.give(there, demands[two])
        fits = ledger.fits(here, demands[two]) and ledger.fits(there, demands[one])
        if fits:
            self._put(one, there)
            self._put(two, here)
        ledger.take(self.hosts[one], demands[one])
        ledger.take(self.hosts[two], demands[two])
        return fits

    def _put(self, rank: int, host: Path) -> None:
        self._ranks[self.hosts[rank]].remove(rank)
        self._ranks[host].add(rank)
        self.hosts[rank] = host

    def _cost(self, rank: int, host: Path, instead: Mapping[int, Path] = MappingProxyType({})) -> int:
        weights = self._task.weights
        return sum(
            distance(host, instead.get(near) or self.hosts[near], weights) for near in self._task.neighbours[rank]
        )

    def _clash(self, rank: int, host: Path, but: int = -1) -> bool:
        return any(self.hosts[other] == host for other in self._task.apart[rank] if other != but)
