"""Plans to choose from: exact where the problem allows it, else several heuristics. Pure."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from pipelinejob_operator.placement import chain, gaps, order, packing, spread
from pipelinejob_operator.placement.fit import Demand
from pipelinejob_operator.placement.links import Shape, measure
from pipelinejob_operator.placement.problem import Problem, Separation
from pipelinejob_operator.placement.search import search
from pipelinejob_operator.placement.topology import Path
from pipelinejob_operator.placement.tree import Domain, build, ranked

TRIALS = 100_000
"""Exchanges that are tried to better a draft that is not known to be the cheapest."""

CHECKS = 400_000
"""Looks at a host in the search for any place at all, for each domain that must hold all stages."""

Hosts = list[Path]
"""The host of each rank."""


def fresh(problem: Problem, separation: Separation) -> Iterator[Hosts]:
    """Plans in which any stage may move."""
    if not problem.equal:
        return _unequal(problem, separation)
    if problem.shape.pipelines == 1:
        return _chain(problem, separation)
    return _chains(problem, separation)


def around(problem: Problem, pinned: Mapping[int, Path], separation: Separation) -> Hosts | None:
    """All ``pinned`` ranks stay, and the others go where the links to them cost least; None if that cannot be."""
    domains = {host[: problem.top] for host in pinned.values()}
    if len(domains) != 1:
        return None
    domain = domains.pop()
    ledger = problem.ledger(domain)
    for rank, host in pinned.items():
        if rank not in problem.keep:
            if not ledger.fits(host, problem.demands[rank]):
                return None
            ledger.take(host, problem.demands[rank])
    placed = dict(pinned)
    if problem.equal and separation == "Off":
        _fill_gaps(problem, placed, ledger)
    else:
        missing = [rank for rank in range(problem.shape.ranks) if rank not in pinned]
        if not packing.one_by_one(problem.task(separation), missing, placed, ledger) and pinned == problem.keep:
            # Only what must stay is worth a search: else all may move.
            placed = _anywhere(problem, domain, separation)
    if len(placed) < problem.shape.ranks:
        return None
    return _bettered(problem, _by_rank(placed), separation, pinned)


def hardest_first(problem: Problem, domain: Path, separation: Separation) -> dict[int, Path]:
    """Ranks with the fewest places first, each near to its neighbours; without those that find no place."""
    placed = dict(problem.keep)
    task, ledger = problem.task(separation), problem.ledger(domain)
    failed: set[Demand] = set()
    for rank in by_places(problem, domain):
        demand = problem.demands[rank]
        if demand not in failed and not packing.one_by_one(task, [rank], placed, ledger):
            failed.add(demand)
    return placed


def by_places(problem: Problem, domain: Path) -> list[int]:
    """The ranks that are not kept, those first of which the fewest would fit into ``domain``."""
    rooms = {demand: problem.rooms(demand) for demand in problem.admitted}
    fit = {
        demand: sum(room for host, room in hosts.items() if host[: len(domain)] == domain)
        for demand, hosts in rooms.items()
    }
    ranks = [rank for rank in range(problem.shape.ranks) if rank not in problem.keep]
    return sorted(ranks, key=lambda rank: (fit[problem.demands[rank]], rank))


def _anywhere(problem: Problem, domain: Path, separation: Separation) -> dict[int, Path]:
    """Any way to place the ranks that are not kept, unless the sums show that there is none."""
    ledger = problem.ledger(domain)
    ranks = by_places(problem, domain)
    asked = Counter[str]()
    for rank in ranks:
        asked.update(dict(problem.demands[rank].requests))
    usable = {host for hosts in problem.admitted.values() for host in hosts} & ledger.free.keys()
    placed = dict(problem.keep)
    if all(sum(max(0, ledger.free[host][name]) for host in usable) >= count for name, count in asked.items()):
        search(problem.task(separation), ranks, placed, ledger, problem.admitted, checks=CHECKS)
    return placed


def _anyhow(problem: Problem, separation: Separation) -> Iterator[Hosts]:
    """What is found in each domain that may hold all stages, if need be by looking for any way at all."""
    domains = ranked(build(problem.rooms_if_all(min)), problem.top, problem.shape.ranks, problem.weights)
    found = False
    for place in (hardest_first, _anywhere):
        for _, domain in [] if found else domains:
            placed = place(problem, domain.path, separation)
            if len(placed) == problem.shape.ranks:
                found = True
                yield _by_rank(placed)


def _by_rank(placed: Mapping[int, Path]) -> Hosts:
    return [placed[rank] for rank in range(len(placed))]


def _chain(problem: Problem, separation: Separation) -> Iterator[Hosts]:
    root = build(problem.rooms(problem.demands[0]))
    if separation != "Off":
        line = spread.solve(root, problem.shape.ranks, problem.weights, top=problem.top)
        if line is not None:
            yield line
        return
    held: dict[Path, int] = {}
    for host in problem.current.values():
        held[host] = held.get(host, 0) + 1
    counts = chain.solve(root, problem.shape.ranks, problem.weights, top=problem.top, held=held)
    if counts is not None:
        yield order.walk(counts, problem.current)


def _chains(problem: Problem, separation: Separation) -> Iterator[Hosts]:
    """One long chain cut into strips, and chain after chain."""
    shape, rooms = problem.shape, problem.rooms(problem.demands[0])
    counts = chain.solve(build(rooms), shape.ranks, problem.weights, top=problem.top)
    if counts is None:
        return iter(())
    drafts: list[Hosts] = []
    if separation == "Off":
        line = order.walk(counts, {})
        widths = [width for width in range(1, shape.pipelines + 1) if shape.pipelines % width == 0]
        drafts += [_strips(line, shape, width) for width in widths]
    inside = _chain_by_chain(problem, rooms, separation)
    if inside is not None:
        drafts.append(inside)
    return _improved(problem, drafts or list(_anyhow(problem, separation)), separation)


def _chain_by_chain(problem: Problem, rooms: Mapping[Path, int], separation: Separation) -> Hosts | None:
    """Each pipeline at its least cost in what those before left, all in the narrowest domain in which that succeeds."""
    root = build(rooms)
    for depth in range(len(problem.weights) - 1, problem.top - 1, -1):
        for _, domain in ranked(root, depth, problem.shape.ranks, problem.weights):
            left = {host: room for host, room in rooms.items() if host[:depth] == domain.path}
            hosts: Hosts = []
            for _ in range(problem.shape.pipelines):
                line = _line(build(left), problem, separation)
                if line is None:
                    break
                for host in line:
                    left[host] -= 1
                hosts += line
            else:
                return hosts
    return None


def _line(root: Domain, problem: Problem, separation: Separation) -> Hosts | None:
    if separation != "Off":
        return spread.solve(root, problem.shape.stages, problem.weights)
    counts = chain.solve(root, problem.shape.stages, problem.weights)
    return None if counts is None else order.walk(counts, {})


def _strips(line: Sequence[Path], shape: Shape, width: int) -> Hosts:
    """``line`` dealt out to ``width`` pipelines at a time, stage by stage: 1 keeps chains whole, all keeps rings."""
    hosts: Hosts = [()] * shape.ranks
    places = iter(line)
    for first in range(0, shape.pipelines, width):
        for stage in range(shape.stages):
            for pipeline in range(first, first + width):
                hosts[pipeline * shape.stages + stage] = next(places)
    return hosts


def _unequal(problem: Problem, separation: Separation) -> Iterator[Hosts]:
    """All as large as the largest, planned exactly, and pieces as long as they fit; else the hardest first, or any."""
    drafts: list[Hosts] = []
    if separation == "Off":
        counts = chain.solve(build(problem.rooms_if_all(max)), problem.shape.ranks, problem.weights, top=problem.top)
        if counts is not None:
            drafts.append(order.walk(counts, {}))
        packed = packing.Packing(problem.ledger(), problem.demands, problem.admitted, problem.weights)
        pieces = packed.best(build(problem.rooms_if_all(min)), problem.top)
        if pieces is not None:
            drafts.append(pieces)
    return _improved(problem, drafts or list(_anyhow(problem, separation)), separation)


def _improved(problem: Problem, drafts: Sequence[Hosts], separation: Separation) -> Iterator[Hosts]:
    """Every draft, and the cheapest of them bettered by exchanges within the same hosts."""
    yield from drafts
    if not drafts:
        return
    hosts = min(drafts, key=lambda draft: (measure(draft, problem.shape, problem.levels).cost, draft))
    yield _bettered(problem, hosts, separation, {})


def _bettered(problem: Problem, hosts: Hosts, separation: Separation, pinned: Mapping[int, Path]) -> Hosts:
    ledger = problem.ledger()
    for rank, host in enumerate(hosts):
        if rank not in problem.keep:
            ledger.take(host, problem.demands[rank])
    exchange = packing.Exchange(problem.task(separation), hosts, ledger, pinned)
    exchange.improve(TRIALS)
    return exchange.hosts


def _fill_gaps(problem: Problem, placed: dict[int, Path], ledger: packing.Ledger) -> None:
    """Gap after gap, each at its least cost in what those before left, until one does not fit.

    A chain without any end goes near another's.
    """
    demand, stages = problem.demands[0], problem.shape.stages
    for first, last in _gaps(placed, problem.shape):
        rooms = {host: demand.room(free) for host, free in ledger.free.items() if ledger.fits(host, demand)}
        before = placed.get(first - 1) if first % stages else None
        after = placed.get(last + 1) if (last + 1) % stages else None
        if before is None and after is None:
            before = placed.get(first - stages) or next(iter(placed.values()))
        hosts = gaps.fill(rooms, last - first + 1, problem.weights, before, after)
        if hosts is None:
            return
        for rank, host in enumerate(hosts, start=first):
            placed[rank] = host
            ledger.take(host, demand)


def _gaps(placed: Mapping[int, Path], shape: Shape) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for rank in range(shape.ranks):
        if rank not in placed:
            if found and found[-1][1] == rank - 1 and rank % shape.stages:
                found[-1] = (found[-1][0], rank)
            else:
                found.append((rank, rank))
    return found
