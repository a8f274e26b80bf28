"""Any place for unequal stages when the heuristics found none: backtracking with a limit. Pure."""

from collections.abc import Iterator, Sequence

from pipelinejob_operator.placement.packing import Admitted, Ledger, Task
from pipelinejob_operator.placement.topology import Path
from pipelinejob_operator.placement.tree import distance


def search(
    task: Task, ranks: Sequence[int], placed: dict[int, Path], ledger: Ledger, admitted: Admitted, *, checks: int
) -> bool:
    """Add hosts for ``ranks``, which are tried in this order, to what is ``placed``; whether that succeeded.

    It gives up after about ``checks`` looks at a host. Where it ends before, there is no way. Of hosts with the same
    free amounts one is tried for a rank.
    """
    trail = [_options(task, ranks[0], placed, ledger, admitted)]
    while trail and checks > 0:
        rank = ranks[len(trail) - 1]
        if rank in placed:
            ledger.give(placed.pop(rank), task.demands[rank])
        host = next(trail[-1], None)
        if host is None:
            trail.pop()
            continue
        placed[rank] = host
        ledger.take(host, task.demands[rank])
        if len(trail) == len(ranks):
            return True
        checks -= len(ledger.free)
        trail.append(_options(task, ranks[len(trail)], placed, ledger, admitted))
    return False


def _options(task: Task, rank: int, placed: dict[int, Path], ledger: Ledger, admitted: Admitted) -> Iterator[Path]:
    """The hosts that ``rank`` fits on, the nearest and fullest first, one of each kind."""
    demand = task.demands[rank]
    linked = [placed[other] for other in task.neighbours[rank] if other in placed]
    shunned = {placed[other] for other in task.apart[rank] if other in placed}
    # Hosts are alike only if no rank that may not share one is on either.
    busy = set(placed.values()) if any(task.apart) else set()
    kinds: dict[object, tuple[int, int, Path]] = {}
    for host in ledger.near((), demand, shunned):
        free = ledger.free[host]
        kind = (*free.values(), *(host in hosts for hosts in admitted.values()), host if host in busy else None)
        option = (sum(distance(host, near, task.weights) for near in linked), demand.room(free), host)
        kinds[kind] = min(kinds.get(kind, option), option)
    return iter([host for _, _, host in sorted(kinds.values())])
