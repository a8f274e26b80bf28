"""Which rank guards which: where the copy of a rank's snapshots is kept. Pure."""

from collections import Counter
from collections.abc import Sequence

COPIES_PER_RANK = 2
"""Most ranks that one guards, where a node has so many that one each would leave some with a guard beside them."""


def copy_holders(nodes: Sequence[str]) -> list[int | None]:
    """Return the guard of each rank, given each rank's node; None where there is one rank only.

    If no node has more than half of the ranks, each guards one other, on another node: ranks are sorted by node and
    shifted by the size of the fullest one. Else the few outside guard ``COPIES_PER_RANK`` of that node's ranks each,
    and are guarded there; whoever is left over is guarded by a neighbour on the same node.
    """
    count = len(nodes)
    if count == 1:
        return [None]
    node, most = max(sorted(Counter(nodes).items()), key=lambda item: item[1])
    if 2 * most <= count:
        order = sorted(range(count), key=lambda rank: (nodes[rank], rank))
        return _guarded({rank: order[(place + most) % count] for place, rank in enumerate(order)})
    inside = [rank for rank in range(count) if nodes[rank] == node]
    outside = [rank for rank in range(count) if nodes[rank] != node]
    places = COPIES_PER_RANK * outside
    guards = dict(zip(inside, places, strict=False)) | dict(zip(outside, reversed(inside), strict=False))
    for place, rank in enumerate(inside[len(places) :], start=len(places)):
        guards[rank] = inside[(place + 1) % most]
    return _guarded(guards)


def _guarded(guards: dict[int, int]) -> list[int | None]:
    return [guards[rank] for rank in sorted(guards)]
