"""Where to put stages between neighbours that stay where they are. Pure."""

from collections.abc import Mapping, Sequence

from pipelinejob_operator.placement.chain import Counts, Tables
from pipelinejob_operator.placement.topology import Path
from pipelinejob_operator.placement.tree import Domain, build, distance, shared_depth


def fill(
    rooms: Mapping[Path, int], size: int, weights: Sequence[int], before: Path | None, after: Path | None
) -> list[Path] | None:
    """Hosts for ``size`` equal stages between the hosts ``before`` and ``after``; None if they do not fit.

    Exact. The domains around both ends are open at no cost. Let w be the weight of the widest level that the stages
    cross and d the distance of the two ends. The way from end to end costs what is opened, plus d if it stays inside
    the narrowest domain that holds both, else w, since it must come back. So for each domain around both ends the
    programme of ``chain.py`` gives the cheapest way inside it. With one end there is no way back to pay.
    """
    root = build(rooms)
    ends = [end for end in (before, after) if end is not None]
    tables = Tables(size, weights)
    for end in ends:
        tables.open(end)
    inner = shared_depth(ends[0], ends[-1])
    apart = distance(ends[0], ends[-1], weights)
    best: tuple[int, Domain] | None = None
    for depth in range(inner, -1, -1):
        domain = _find(root, ends[0][:depth])
        if domain is not None and domain.room >= size:
            cost = tables.of(domain)[size] + (weights[depth] if len(ends) == 2 and depth < inner else apart)
            best = (cost, domain) if best is None or cost < best[0] else best
        # To go farther opens a domain across the next wider level, and crosses it again to come back.
        if best is not None and depth > 0 and best[0] <= weights[depth - 1] * len(ends):
            break
    if best is None:
        return None
    counts: Counts = {}
    tables.take(best[1], size, counts)
    return [host for host in sorted(counts, key=lambda host: _turn(host, before, after)) for _ in range(counts[host])]


def _turn(host: Path, before: Path | None, after: Path | None) -> tuple[int, int, Path]:
    """Away from ``before`` level by level, then what is near neither, then level by level towards ``after``."""
    apart = shared_depth(before, after) if before is not None and after is not None else -1
    if before is not None and shared_depth(host, before) > apart:
        return 0, -shared_depth(host, before), host
    if after is not None and shared_depth(host, after) > apart:
        return 2, shared_depth(host, after), host
    return 1, -shared_depth(host, before) if before is not None else 0, host


def _find(root: Domain, path: Path) -> Domain | None:
    domain: Domain | None = root
    for depth in range(1, len(path) + 1):
        domain = next((child for child in domain.children if child.path == path[:depth]), None) if domain else None
    return domain
