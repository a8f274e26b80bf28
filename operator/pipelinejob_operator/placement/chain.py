"""The cheapest embedding of one chain of equal stages into the tree: exact, by dynamic programming. Pure.

Weights do not grow from a wide level to a narrower one, so distances are an ultrametric: of any three hosts, the two
largest distances are equal. For a given set of used hosts no chain is cheaper than their minimum spanning tree, since a
chain is a spanning tree; and the order in which a depth-first walk meets the hosts costs exactly that. So in some
optimal embedding **every domain holds one contiguous piece of the chain**, and what is left to choose is which domains
are used: the cost is, over all used domains, the weight between its children times (used children - 1).

``f(D, k)``, the least cost of k stages inside domain D, is therefore a min-plus convolution over the children of D, in
which each used child adds the weight between children once:

    f(host, k) = 0                                       for k <= room
    f(D, k)    = min sum(f(child, k_child) + w) - w      over the used children, sum(k_child) = k

f does not fall with k, as the plan for k holds any smaller number too. Hence only the largest k of each cost is tried,
and the hosts of a domain are taken by falling room. Time: hosts * log(hosts) + domains * breakpoints * k.

Two additions keep the same programme: a domain that is *open* costs nothing to use, because the chain is there already
(``gaps.py``); and *held* stages make a host better by one each, in units too small to change the cost, so that among
equal costs the plan that can keep most stages in place wins (``replan.py``).
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import pairwise

from pipelinejob_operator.placement.topology import Path
from pipelinejob_operator.placement.tree import Domain, ranked, shared_depth

_NEVER = 1 << 256
"""Dearer than any plan: weights are below 2**128."""

Counts = dict[Path, int]
"""How many stages each used host takes."""


class Tables:
    """The tables f(D, k) for k up to ``size``, computed where they are needed."""

    def __init__(self, size: int, weights: Sequence[int], held: Mapping[Path, int] | None = None) -> None:
        self._size = size
        self._held = held or {}
        self.unit = size + 1 if self._held else 1
        """Cost of one unit of weight in the tables: more than all held stages together."""
        self._weights = [weight * self.unit for weight in weights]
        self._opened: set[Path] = set()
        self._special = {path[:depth] for path in self._held for depth in range(len(path) + 1)}
        self._tables: dict[Path, list[int]] = {}

    def open(self, host: Path) -> None:
        """Let ``host`` and all domains around it cost nothing to use; before the first look."""
        prefixes = {host[:depth] for depth in range(len(host) + 1)}
        self._opened |= prefixes
        self._special |= prefixes

    def of(self, domain: Domain) -> list[int]:
        """f(``domain``, k) for k = 0 ... min(size, room)."""
        table = self._tables.get(domain.path)
        if table is None:
            table = self._tables[domain.path] = self._compute(domain)
        return table

    def take(self, domain: Domain, count: int, into: Counts) -> None:
        """Write the hosts of a plan of cost f(``domain``, ``count``) ``into`` it."""
        if not domain.children:
            into[domain.path] = count
        elif self._simple(domain):
            into.update(_fewest(domain.children, count))
        else:
            steps = list(self._steps(domain))
            for child, before, after in reversed(steps):
                if count == 0:
                    break
                if count < len(before) and before[count] == after[count]:
                    continue
                share, count = self._share(child, count, before, after)
                self.take(child, share, into)

    def _compute(self, domain: Domain) -> list[int]:
        size = min(self._size, domain.room)
        if not domain.children:
            held = self._held.get(domain.path, 0)
            return [-min(count, held) for count in range(size + 1)]
        if self._simple(domain):
            table = [0]
            weight = self._weights[domain.children[0].depth - 1]
            for used, room in enumerate(sorted((host.room for host in domain.children), reverse=True)):
                table.extend([used * weight] * min(room, size + 1 - len(table)))
                if len(table) > size:
                    break
            return table
        *_, (_, _, total) = self._steps(domain)
        # The first used child crosses nothing, unless the chain is in this domain already.
        return total if domain.path in self._opened else [0, *(c - self._weights[domain.depth] for c in total[1:])]

    def _simple(self, domain: Domain) -> bool:
        return domain.path not in self._special and not domain.children[0].children

    def _steps(self, domain: Domain) -> list[tuple[Domain, list[int], list[int]]]:
        """Children with the table over those before them and the one with them.

        Small children come first, so that among equal plans the one that leaves large domains whole is found. Special
        ones come last: their tables may fall with k, so each k of theirs is a case of its own. Plain hosts are taken
        together as one child without a name.
        """
        children = domain.children
        if not children[0].children:
            plain = [host for host in children if host.path not in self._special]
            unnamed = Domain((*domain.path, ""), sum(host.room for host in plain), plain)
            children = [unnamed] * bool(plain) + [host for host in children if host.path in self._special]
        order = sorted(children, key=lambda child: (child.path in self._special, child.room, child.path))
        steps: list[tuple[Domain, list[int], list[int]]] = []
        before = [0]
        for child in order:
            after = self._merge(child, before)
            steps.append((child, before, after))
            before = after
        return steps

    def _choices(self, child: Domain) -> list[tuple[int, int]]:
        """Numbers of stages to give a used ``child``, and what that costs."""
        weight = 0 if child.path in self._opened else self._weights[child.depth - 1]
        table = self.of(child)
        special = child.path in self._special
        return [
            (count, table[count] + weight)
            for count in range(1, len(table))
            if special or count + 1 == len(table) or table[count] != table[count + 1]
        ]

    def _merge(self, child: Domain, before: list[int]) -> list[int]:
        choices, table = self._choices(child), self.of(child)
        size = min(self._size, len(before) - 1 + len(table) - 1)
        after = before + [_NEVER] * (size + 1 - len(before))
        special = child.path in self._special
        if not special:
            # A plain child that can take many can take fewer at no more, so alone it does for all up to its room.
            weight = choices[0][1] - table[choices[0][0]]
            alone = [cost + weight for cost in table[1 : size + 1]]
            after[1 : len(alone) + 1] = _least(after[1:], alone)
        for count, cost in choices:
            # What is dearer than the dearest entry so far betters none.
            end = size + 1 - count if special else min(size + 1 - count, bisect_left(before, after[-1] - cost))
            shifted = [earlier + cost for earlier in before[: max(0, end)]]
            after[count : count + len(shifted)] = _least(after[count:], shifted)
        return after

    def _share(self, child: Domain, count: int, before: list[int], after: list[int]) -> tuple[int, int]:
        special = child.path in self._special
        for most, cost in self._choices(child):
            rest = count - most if special else max(0, count - most)
            if 0 <= rest < len(before) and before[rest] + cost == after[count]:
                return count - rest, rest
        raise AssertionError(f"no share of {child.path} leads to the cost found for {count} stages")


def _least(some: Sequence[int], others: Sequence[int]) -> list[int]:
    return [one if one < other else other for one, other in zip(some, others, strict=False)]


def _fewest(hosts: Sequence[Domain], count: int) -> Counts:
    """As few of ``hosts`` as hold ``count``, and of those the smallest that do: large ones stay whole for others."""
    spare = sorted(hosts, key=lambda host: (host.room, host.path))
    chosen: list[Domain] = []
    excess = -count
    while excess < 0:
        chosen.append(spare.pop())
        excess += chosen[-1].room
    for index, host in enumerate(chosen):
        position = bisect_left(spare, host.room - excess, key=lambda other: other.room)
        if position < len(spare) and spare[position].room < host.room:
            chosen[index] = spare.pop(position)
            excess -= host.room - chosen[index].room
            # The larger host is not put back: all that follow in `chosen` are no larger, so none would take it.
    counts: Counts = {}
    for host in chosen:
        counts[host.path] = min(host.room, count)
        count -= counts[host.path]
    return counts


def solve(
    root: Domain, size: int, weights: Sequence[int], *, top: int = 0, held: Mapping[Path, int] | None = None
) -> Counts | None:
    """Hosts for a chain of ``size`` equal stages at the least cost, or None if it fits nowhere.

    All hosts lie in one domain of depth ``top``. Among equal costs most ``held`` stages have their host still, then
    small domains are taken before large ones. Sorted by path, the hosts are in an order that has this cost.
    """
    tables = Tables(size, weights, held)
    gain = tables.unit - 1
    best: tuple[int, Domain] | None = None
    for depth in range(len(weights), top - 1, -1):
        for bound, domain in ranked(root, depth, size, weights):
            if best is not None and bound * tables.unit - gain >= best[0]:
                break
            cost = tables.of(domain)[size]
            best = (cost, domain) if best is None or cost < best[0] else best
        # What does not fit into one domain of this depth has a link that leaves it; no gain can outweigh that.
        if best is not None and depth > 0 and best[0] <= weights[depth - 1] * tables.unit - gain:
            break
    if best is None:
        return None
    counts: Counts = {}
    tables.take(best[1], size, counts)
    return counts


def least_cost(root: Domain, size: int, weights: Sequence[int], *, top: int = 0) -> int | None:
    """Cost of what ``solve`` finds."""
    counts = solve(root, size, weights, top=top)
    if counts is None:
        return None
    return sum(weights[shared_depth(one, other)] for one, other in pairwise(sorted(counts)))
