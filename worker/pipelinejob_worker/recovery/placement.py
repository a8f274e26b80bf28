"""Which rank guards which: where the copy of a rank's snapshots is kept. Pure."""

from collections import Counter
from collections.abc import Sequence


def copy_holders(nodes: Sequence[str]) -> list[int | None]:
    """Return the guard of each rank, given each rank's node; None where there is one rank only.

    Each rank guards one other, and as many as the nodes allow are guarded on another node: ranks are sorted by node and
    shifted by the size of the fullest one, which carries every rank out of its node if no node has more than half.
    """
    count = len(nodes)
    if count == 1:
        return [None]
    order = sorted(range(count), key=lambda rank: (nodes[rank], rank))
    shift = max(Counter(nodes).values()) % count or 1
    guards: list[int | None] = [None] * count
    for place, rank in enumerate(order):
        guards[rank] = order[(place + shift) % count]
    return guards
