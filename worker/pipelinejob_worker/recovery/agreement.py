"""The step to go on from, and who fetches what from whom. Pure.

One rule for a crash, a lost pod, several of them and another number of stages: the largest step at which every layer
is held by anyone present.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pydantic import Field

from pipelinejob_worker.protocol.base import Wire
from pipelinejob_worker.recovery.pieces import Held, Lineage, Piece, complete_layers


class Holding(Wire):
    """A piece and the rank that holds it."""

    rank: int = Field(ge=0)
    held: Held


@dataclass(frozen=True)
class Fetch:
    """A piece that a rank lacks, and which rank has it: its own, if it is the copy that it keeps for another.

    ``sole``: no other rank needs the layer, so that nobody will ask this rank to keep a copy of it.
    """

    held: Held
    source: int
    sole: bool = False


def agree(inventories: Mapping[int, Iterable[Held]], lineage: Lineage) -> tuple[int, list[Holding]] | None:
    """Return the step to go on from and all that is held of it, by rank; None if no step is whole.

    ``inventories``: valid slots by rank; ``lineage``: what all ranks know together.
    """
    by_step: dict[int, list[Holding]] = defaultdict(list)
    for rank, inventory in sorted(inventories.items()):
        for held in inventory:
            if lineage.counts(held):
                by_step[held.step].append(Holding(rank=rank, held=held))
    for step in sorted(by_step, reverse=True):
        holdings = by_step[step]
        layers = holdings[0].held.layers
        if len(complete_layers(holding.held.piece for holding in holdings)) == layers:
            return step, holdings
    return None


def held_twice(holdings: Iterable[Holding]) -> bool:
    """Whether no single rank's loss takes anything of this step away, so that older steps are of no use any more."""
    ranks: dict[Piece, set[int]] = defaultdict(set)
    for holding in holdings:
        ranks[holding.held.piece].add(holding.rank)
    return all(len(holders) > 1 for holders in ranks.values())


def assign(holdings: Sequence[Holding], needs: Mapping[int, Collection[int]]) -> dict[int, list[Fetch]]:
    """Return what each rank has to fetch so that it owns all shares of the layers that it needs.

    ``holdings``: of one step that is whole; ``needs``: layers by rank. A copy at hand comes first; else, the largest
    pieces first, whoever has least to send so far (Graham 1969). Every rank that computes this gets the same.
    """
    holders: dict[Piece, list[Holding]] = defaultdict(list)
    for holding in holdings:
        holders[holding.held.piece].append(holding)
    shares = complete_layers(holders)
    needing = Counter(layer for layers in needs.values() for layer in set(layers))
    loads: dict[int, int] = defaultdict(int)
    fetches: dict[int, list[Fetch]] = {rank: [] for rank in needs}
    wanted = [
        (rank, Piece(layer, share, shares[layer]))
        for rank, layers in sorted(needs.items())
        for layer in sorted(layers)
        for share in range(shares[layer])
    ]
    for rank, piece in sorted(wanted, key=lambda want: -holders[want[1]][0].held.size):
        here = [holding for holding in holders[piece] if holding.rank == rank]
        if any(not holding.held.copied for holding in here):
            continue
        source = here[0] if here else min(holders[piece], key=lambda holding: (loads[holding.rank], holding.rank))
        if not here:
            loads[source.rank] += source.held.size
        fetches[rank].append(Fetch(source.held, source.rank, sole=needing[piece.layer] == 1))
    return fetches
