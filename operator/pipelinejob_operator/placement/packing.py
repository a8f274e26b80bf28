"""Chains of unequal stages, and stages with neighbours anywhere: heuristics. Pure.

To decide whether unequal stages fit at all is bin packing, so what is found here may be dearer than need be, and may be
nothing although there is a way. ``planner.py`` says what bound holds.
"""

from bisect import bisect_right
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType

from pipelinejob_operator.placement.fit import Demand, available
from pipelinejob_operator.placement.topology import Path
from pipelinejob_operator.placement.tree import Domain, distance, ranked

Admitted = Mapping[Demand, frozenset[Path]]
"""The hosts that each different demand may use, full or not."""

_ENOUGH = 8
"""Domains of one level that hold all stages and are compared."""


class Ledger:
    """What is free on each host while stages are put on it."""

    def __init__(self, free: Mapping[Path, Mapping[str, int]], admitted: Admitted) -> None:
        self._admitted = admitted
        names = sorted({name for demand in admitted for name, _ in demand.requests})
        self.free = {host: {name: available(amounts, name) for name in names} for host, amounts in free.items()}
        self._inside: dict[Path, list[Path]] = {}
        for host in sorted(frozenset[Path]().union(*admitted.values())):
            for depth in range(len(host) + 1):
                self._inside.setdefault(host[:depth], []).append(host)

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

    def near(self, host: Path, demand: Demand, shunned: Container[Path]) -> list[Path]:
        """The hosts nearest to ``host`` that one more such stage fits on, none of them ``shunned``."""
        for depth in range(len(host), -1, -1):
            found = [
                other
                for other in self._inside.get(host[:depth], ())
                if other not in shunned and self.fits(other, demand)
            ]
            if found:
                return found
        return []

    def _add(self, host: Path, demand: Demand, sign: int) -> None:
        for name, count in demand.requests:
            self.free[host][name] += sign * count


class Packing:
    """Pieces of a chain laid into domains, the longest first: each host takes as many next stages as fit.

    The chain is never interrupted inside a domain, so the cost is that of a walk through the used hosts.
    """

    def __init__(self, ledger: Ledger, demands: Sequence[Demand], admitted: Admitted, weights: Sequence[int]) -> None:
        self._size = len(demands)
        self._weights = weights
        names = sorted({name for demand in admitted for name, _ in demand.requests})
        asked = [dict(demand.requests) for demand in demands]
        # By resource: what the first k stages ask for together.
        self._sums = [[0, *accumulate(amounts.get(name, 0) for amounts in asked)] for name in names]
        self._free = {host: [amounts[name] for name in names] for host, amounts in ledger.free.items()}
        self._stop = _stops(demands, admitted, ledger.free)
        self._found: dict[tuple[Path, int], tuple[int, int, list[Path]]] = {}

    def best(self, root: Domain, top: int) -> list[Path] | None:
        """Hosts for all stages inside one domain of depth ``top``: the cheapest of the first few narrow ones that do.

        ``root`` has the room that there would be for the smallest of the stages.
        """
        for depth in range(len(self._weights), top - 1, -1):
            complete: list[tuple[int, list[Path]]] = []
            for _, domain in ranked(root, depth, self._size, self._weights):
                end, cost, hosts = self._reach(domain, 0)
                if end == self._size:
                    complete.append((cost, hosts))
                if len(complete) == _ENOUGH:
                    break
            if complete:
                return min(complete)[1]
        return None

    def _reach(self, domain: Domain, start: int) -> tuple[int, int, list[Path]]:
        """How far ``domain`` takes the chain from stage ``start`` on: the end, the cost, and the hosts."""
        if not domain.children:
            end = self._end(domain.path, start)
            return end, 0, [domain.path] * (end - start)
        known = self._found.get((domain.path, start))
        if known is None:
            known = self._found[domain.path, start] = self._nest(domain, start)
        return known

    def _nest(self, domain: Domain, start: int) -> tuple[int, int, list[Path]]:
        spare = list(domain.children)
        leaves = not spare[0].children
        end, cost = start, 0
        hosts: list[Path] = []
        while spare and end < self._size:
            if leaves:
                child = max(spare, key=lambda host: self._end(host.path, end))
            else:
                child = min(spare, key=lambda inner: (-self._reach(inner, end)[0], self._reach(inner, end)[1]))
            reached, inside, used = self._reach(child, end)
            if reached == end:
                break
            cost += inside + (self._weights[domain.depth] if hosts else 0)
            hosts = hosts + used
            end = reached
            spare.remove(child)
        return end, cost, hosts

    def _end(self, host: Path, start: int) -> int:
        """The first stage from ``start`` on that does not fit on ``host`` together with those before it."""
        end = self._stop[host][start]
        for sums, free in zip(self._sums, self._free[host], strict=True):
            end = bisect_right(sums, sums[start] + free, start, end + 1) - 1
        return max(start, end)


def _stops(demands: Sequence[Demand], admitted: Admitted, hosts: Iterable[Path]) -> dict[Path, list[int]]:
    """Of each host, by stage: the first stage from there on that may not run on it. Alike hosts share a list."""
    kinds: dict[tuple[bool, ...], list[int]] = {}
    stops: dict[Path, list[int]] = {}
    for host in hosts:
        may = {demand: host in allowed for demand, allowed in admitted.items()}
        kind = tuple(may.values())
        if kind not in kinds:
            stop = [len(demands)] * (len(demands) + 1)
            for stage in reversed(range(len(demands))):
                stop[stage] = stop[stage + 1] if may[demands[stage]] else stage
            kinds[kind] = stop
        stops[host] = kinds[kind]
    return stops


@dataclass(frozen=True, slots=True)
class Task:
    """What the search below is about: by rank the demand, the linked ranks, and those that must have another host."""

    demands: Sequence[Demand]
    neighbours: Sequence[Sequence[int]]
    apart: Sequence[frozenset[int]]
    weights: Sequence[int]


def one_by_one(task: Task, ranks: Iterable[int], placed: dict[int, Path], ledger: Ledger) -> bool:
    """Put each of ``ranks`` where the links to what is ``placed`` cost least, the fullest such host first.

    Such a host is among those nearest to one of the linked hosts: with a the nearer of two linked hosts a and b, any
    host nearer to a is no farther from b, as distances are an ultrametric. A rank without a link to what is placed goes
    near the rank closest to it. Adds to ``placed`` and takes from ``ledger``; False at the first that fits nowhere.
    """
    for rank in ranks:
        demand = task.demands[rank]
        linked = [placed[other] for other in task.neighbours[rank] if other in placed]
        shunned = {placed[other] for other in task.apart[rank] if other in placed}
        anchors = linked or [placed[min(placed, key=lambda other: (abs(other - rank), other))]] if placed else [()]
        options = [
            (sum(distance(host, near, task.weights) for near in linked), demand.room(ledger.free[host]), host)
            for anchor in dict.fromkeys(anchors)
            for host in ledger.near(anchor, demand, shunned)
        ]
        if not options:
            return False
        _, _, placed[rank] = min(options)
        ledger.take(placed[rank], demand)
    return True


class Exchange:
    """A plan that is bettered step by step: a rank moves to a neighbour's host, or changes places with a rank there.

    ``ledger`` has all ranks taken already. Those of ``fixed`` stay.
    """

    def __init__(self, task: Task, hosts: Sequence[Path], ledger: Ledger, fixed: Container[int]) -> None:
        self.hosts = list(hosts)
        self._task = task
        self._ledger = ledger
        self._loose = frozenset(rank for rank in range(len(self.hosts)) if rank not in fixed)
        self._ranks: dict[Path, set[int]] = {host: set() for host in hosts}
        for rank, host in enumerate(self.hosts):
            self._ranks[host].add(rank)

    def improve(self, trials: int) -> None:
        """Take every step that lowers the cost, until there is none or ``trials`` changes have been looked at.

        Ranks that must be apart are never brought together.
        """
        better = True
        while better:
            better = False
            for rank in sorted(self._loose):
                for near in self._task.neighbours[rank]:
                    host = self.hosts[near]
                    if host == self.hosts[rank]:
                        continue
                    better |= self._move(rank, host)
                    for other in sorted(self._ranks[host] & self._loose):
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
