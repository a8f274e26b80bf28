"""The cheapest embedding of a chain of equal stages whose neighbours must not share a host: exact. Pure.

Now a domain may have to hold several pieces of the chain: two racks with one free host each hold a chain only as
A B A B. So the state is (k, r): k stages in r *runs*, pieces that are contiguous inside the domain.

* A host has k stages only as k runs.
* a runs of some children and b runs of another child join to r runs of their parent, at a + b - r crossings, if and
  only if |a - b| <= r <= a + b: each run of the parent alternates between the two kinds. Merging child after child
  reaches every arrangement, since any arrangement splits into maximal runs of the first children.
* Of a rack, whose children are hosts, r runs hold k stages if and only if sum(min(room, (k + r) // 2)) >= k, because a
  run of length t has at most (t + 1) // 2 stages of one host.
* No domain needs more runs than the fullest host has stages. Take a plan of least cost and in it a deepest domain with
  the most runs of all, more than that. One run fewer is possible inside (its children have no more runs than the limit,
  so r - 1 is still in the range above), costs no more, and is possible outside: a sibling that needed it to stay apart
  would have had more runs still.

Every link crosses at least the hosts, so that part is constant and only the excess over it is counted. Then a cost is
the same for every k that r runs of a rack can hold, and the tables of ``chain.py`` carry over: with r fixed they do not
fall with k, for the end of a run of two or more can be left off.
"""

from collections.abc import Iterator, Sequence

from pipelinejob_operator.placement.topology import Path
from pipelinejob_operator.placement.tree import Domain, at_depth, ranked

_NEVER = 1 << 256

Run = list[Path]
Table = list[list[int]]
"""Least excess cost by [runs][stages]."""


def solve(root: Domain, size: int, weights: Sequence[int], *, top: int = 0) -> Run | None:
    """Hosts in the order of the chain, neighbours always on two hosts, at the least cost; None if there is no way.

    The search with one run a domain is quick and mostly meets the bound in which a rack holds what its hosts hold
    together; only if it does not, the whole is searched.
    """
    hosts = list(at_depth(root, len(weights)))
    if size == 1:
        return [min(hosts, key=lambda host: (host.room, host.path)).path] if hosts else None
    runs = min(max((host.room for host in hosts), default=0), (size + 1) // 2)
    tables = _Tables(size, weights, 1)
    best = _best(tables, root, top)
    if runs > 1:
        bound = _best(_Tables(size, weights, 1, relaxed=True), root, top)
        if bound is not None and (best is None or bound[0] < best[0]):
            tables = _Tables(size, weights, runs)
            best = _best(tables, root, top)
    return None if best is None else tables.arrange(best[1], size, 1)[0]


def _best(tables: "_Tables", root: Domain, top: int) -> tuple[int, Domain] | None:
    best: tuple[int, Domain] | None = None
    for depth in range(len(tables.excess) - 1, top - 1, -1):
        for bound, domain in ranked(root, depth, tables.size, tables.excess):
            if best is not None and bound >= best[0]:
                break
            cost = tables.of(domain)[1][tables.size]
            if cost < _NEVER and (best is None or cost < best[0]):
                best = (cost, domain)
        if best is not None and depth > 0 and best[0] <= tables.excess[depth - 1]:
            break
    return best


class _Tables:
    def __init__(self, size: int, weights: Sequence[int], runs: int, *, relaxed: bool = False) -> None:
        self.size = size
        self.excess = [weight - weights[-1] for weight in weights]
        self._runs = runs
        self._relaxed = relaxed
        self._tables: dict[Path, Table] = {}

    def of(self, domain: Domain) -> Table:
        table = self._tables.get(domain.path)
        if table is None:
            rack = not domain.children[0].children
            table = self._rack(domain) if rack else self._steps(domain)[-1][2]
            self._tables[domain.path] = table
        return table

    def arrange(self, domain: Domain, count: int, runs: int) -> list[Run]:
        """``count`` stages inside ``domain`` in ``runs`` runs, at the cost that the table has for them."""
        if not domain.children[0].children:
            return _arrange_rack(domain, count, runs)
        parts: list[tuple[list[Run], int]] = []
        for child, before, after in reversed(self._steps(domain)):
            if count == 0:
                break
            if _entry(before, runs, count) == after[runs][count]:
                continue
            inner, own, share = self._share(child, before, after, count, runs)
            parts.append((self.arrange(child, share, own), runs))
            runs, count = inner, count - share
        joined, _ = parts.pop()
        for pieces, outer in reversed(parts):
            joined = _join(joined, pieces, outer)
        return joined

    def _rack(self, domain: Domain) -> Table:
        rooms = [host.room for host in domain.children]
        size = min(self.size, domain.room)
        table = [[0] + [_NEVER] * size]
        for runs in range(1, self._runs + 1):
            row = [_NEVER] * (size + 1)
            for count in range(runs, size + 1):
                if not self._relaxed and sum(min(room, (count + runs) // 2) for room in rooms) < count:
                    break
                row[count] = 0
            table.append(row)
        return table

    def _steps(self, domain: Domain) -> list[tuple[Domain, Table, Table]]:
        steps: list[tuple[Domain, Table, Table]] = []
        before: Table = [[0], *([_NEVER] for _ in range(self._runs))]
        for child in sorted(domain.children, key=lambda child: (child.room, child.path)):
            after = self._merge(before, self.of(child), self.excess[domain.depth])
            steps.append((child, before, after))
            before = after
        return steps

    def _merge(self, before: Table, child: Table, weight: int) -> Table:
        size = min(self.size, len(before[0]) - 1 + len(child[0]) - 1)
        after = [row + [_NEVER] * (size + 1 - len(row)) for row in before]
        for inner in range(self._runs + 1):
            for own in range(1, self._runs + 1):
                both = _convolve(before[inner], inner, child[own], own, size)
                if both is None:
                    continue
                for runs in self._joint(inner, own):
                    extra = (inner + own - runs) * weight
                    joined = [cost + extra for cost in both]
                    after[runs] = [a if a < b else b for a, b in zip(after[runs], joined, strict=True)]
        return after

    def _joint(self, inner: int, own: int) -> range:
        return range(max(1, abs(inner - own)), min(self._runs, inner + own) + 1)

    def _share(self, child: Domain, before: Table, after: Table, count: int, runs: int) -> tuple[int, int, int]:
        table, weight = self.of(child), self.excess[child.depth - 1]
        for inner in range(self._runs + 1):
            for own in range(1, self._runs + 1):
                if runs not in self._joint(inner, own):
                    continue
                extra = (inner + own - runs) * weight
                for share, cost in _breakpoints(table[own], own):
                    rest = max(inner, count - share)
                    if rest + own > count or (inner == 0 and rest > 0):
                        continue
                    if _entry(before, inner, rest) + cost + extra == after[runs][count]:
                        return inner, own, count - rest
        raise AssertionError(f"no share of {child.path} leads to the cost found for {count} stages in {runs} runs")


def _entry(table: Table, runs: int, count: int) -> int:
    return table[runs][count] if count < len(table[runs]) else _NEVER


def _breakpoints(row: Sequence[int], runs: int) -> Iterator[tuple[int, int]]:
    """The largest count of each cost: fewer stages in as many runs cost no more."""
    for count in range(runs, len(row)):
        if row[count] < _NEVER and (count + 1 == len(row) or row[count] != row[count + 1]):
            yield count, row[count]


def _convolve(before: list[int], inner: int, child: list[int], own: int, size: int) -> list[int] | None:
    """Least cost by total count, for ``inner`` runs before and ``own`` runs of the child; None if there is none."""
    if inner >= len(before) or before[inner] >= _NEVER:
        return None
    total: list[int] | None = None
    for most, cost in _breakpoints(child, own):
        # The child takes `most` or fewer, but never so many that less than one stage a run is left before it.
        floor = [before[inner] + cost] * min(most - own + 1, size + 1 - inner - own)
        last = 0 if inner == 0 else size - most
        tail = [earlier + cost for earlier in before[inner + 1 : last + 1]]
        row = [_NEVER] * min(inner + own, size + 1) + floor + tail
        row = row[: size + 1] + [_NEVER] * (size + 1 - len(row))
        total = row if total is None else [a if a < b else b for a, b in zip(total, row, strict=True)]
    return total


def _arrange_rack(rack: Domain, count: int, runs: int) -> list[Run]:
    counts: dict[Path, int] = {}
    left = count
    for host in sorted(rack.children, key=lambda host: (-host.room, host.path)):
        counts[host.path] = min(host.room, (count + runs) // 2, left)
        left -= counts[host.path]
    order = sorted((path for path in counts if counts[path]), key=lambda path: (-counts[path], path))
    fullest = counts[order[0]]
    stages = [path for path in order for _ in range(counts[path])]
    others = stages[fullest:]
    if fullest > len(others) + 1:
        first = [order[0]] + [path for other in others for path in (other, order[0])]
        pieces = [first] + [[order[0]] for _ in range(fullest - len(others) - 1)]
    else:
        line = [stages[0]] * count
        half = (count + 1) // 2
        line[::2], line[1::2] = stages[:half], stages[half:]
        pieces = [line]
    while len(pieces) < runs:
        longest = max(pieces, key=len)
        pieces.append([longest.pop()])
    return pieces


def _join(one: list[Run], other: list[Run], runs: int) -> list[Run]:
    """``runs`` runs in which pieces of ``one`` and ``other`` alternate; the ranges in the module's text allow it."""
    more, fewer = (one, other) if len(one) >= len(other) else (other, one)
    surplus = len(more) - len(fewer)
    more, fewer = list(more), list(fewer)
    joined: list[Run] = [more.pop() for _ in range(surplus)]
    pairs = list(zip(more, fewer, strict=True))
    balanced = runs - surplus
    if balanced == 0:
        for left, right in pairs:
            joined[0] = joined[0] + right + left
        return joined
    for left, right in pairs[: max(0, balanced - len(pairs))]:
        joined += [left, right]
    pairs = pairs[max(0, balanced - len(pairs)) :]
    room = runs - len(joined)
    joined += [left + right for left, right in pairs[: max(0, room - 1)]]
    rest = [path for left, right in pairs[max(0, room - 1) :] for path in left + right]
    return [*joined, rest] if rest else joined
