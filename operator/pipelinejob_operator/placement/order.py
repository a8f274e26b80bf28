"""In which order a chain runs through the hosts chosen for it. Pure."""

from collections.abc import Mapping

from pipelinejob_operator.placement.chain import Counts
from pipelinejob_operator.placement.topology import Path


def walk(counts: Counts, held: Mapping[int, Path]) -> list[Path]:
    """The host of each stage: a depth-first walk, so every domain holds one piece, near to where stages are ``held``.

    Any such walk has the same cost; the order of the children is free. In each domain those that hold stages now come
    in the order of these, and each new one goes where most stages still keep their host. Not exact: with several new
    domains of different sizes the best order is a bin packing problem.
    """
    stages: dict[Path, list[int]] = {}
    for stage, host in sorted(held.items()):
        for depth in range(1, len(host) + 1):
            stages.setdefault(host[:depth], []).append(stage)
    return _walk(sorted(counts), 0, counts, stages, 0)


def _walk(hosts: list[Path], depth: int, counts: Counts, stages: Mapping[Path, list[int]], start: int) -> list[Path]:
    if len(hosts) == 1:
        return [hosts[0]] * counts[hosts[0]]
    groups: dict[Path, list[Path]] = {}
    for host in hosts:
        groups.setdefault(host[: depth + 1], []).append(host)
    sizes = {domain: sum(counts[host] for host in inside) for domain, inside in groups.items()}
    line: list[Path] = []
    for domain in _order(sizes, stages, start):
        line += _walk(groups[domain], depth + 1, counts, stages, start + len(line))
    return line


def _order(sizes: Mapping[Path, int], stages: Mapping[Path, list[int]], start: int) -> list[Path]:
    settled = [domain for domain in sizes if domain in stages]
    order = sorted(settled, key=lambda domain: (sum(stages[domain]) / len(stages[domain]), domain))
    for domain in sizes:
        if domain not in stages:
            options = [[*order[:index], domain, *order[index:]] for index in range(len(order) + 1)] if settled else []
            order = max(options, key=lambda option: _kept(option, sizes, stages, start), default=[*order, domain])
    return order


def _kept(order: list[Path], sizes: Mapping[Path, int], stages: Mapping[Path, list[int]], start: int) -> int:
    kept = 0
    for domain in order:
        kept += sum(start <= stage < start + sizes[domain] for stage in stages.get(domain, ()))
        start += sizes[domain]
    return kept
