"""What is held for recovery, and which of it still counts. Pure."""

from collections.abc import Iterable, Mapping
from typing import Annotated, NamedTuple

from pydantic import Field

from pipelinejob_worker.protocol.base import Wire

MAX_SHARES = 4096
MAX_LAYERS = 100_000
ROLLBACKS_KEPT = 256


class Piece(NamedTuple):
    """What one rank holds of a layer: the whole, or one of the shares that data-parallel copies have of it."""

    layer: Annotated[int, Field(ge=0, lt=MAX_LAYERS)]
    share: Annotated[int, Field(ge=0, lt=MAX_SHARES)] = 0
    shares: Annotated[int, Field(ge=1, le=MAX_SHARES)] = 1

    def __str__(self) -> str:
        return f"{self.layer}-{self.share}-{self.shares}"


class Incarnation(NamedTuple):
    """One life of the process group: the epoch comes from the operator, the attempt from the agents."""

    epoch: Annotated[int, Field(ge=0)]
    attempt: Annotated[int, Field(ge=0)]

    def __str__(self) -> str:
        return f"{self.epoch}.{self.attempt}"


NEVER = Incarnation(0, 0)
"""Before every incarnation."""


class Held(Wire):
    """A valid slot: a piece of the state after ``step`` steps, as incarnation ``written`` computed it."""

    piece: Piece
    step: int = Field(ge=0, lt=1 << 48)
    written: Incarnation
    size: int = Field(ge=0, lt=1 << 48, description="Bytes of the payload.")
    layers: int = Field(ge=1, le=MAX_LAYERS, description="Layers of the whole model.")
    copied: bool = Field(False, description="Whether it is the copy of another rank's piece.")


class Rollback(Wire):
    """An incarnation went on from ``step``: what older ones computed above it is void."""

    incarnation: Incarnation
    step: int = Field(ge=0)


class Lineage(Wire):
    """All rollbacks that an agent knows, as far as they matter.

    Incarnations and steps both ascend: a later rollback to the same or a lower step makes an earlier one superfluous.
    Of what older incarnations than ``forgotten`` computed nothing counts: their rollbacks are no longer known.
    """

    rollbacks: tuple[Rollback, ...] = Field((), max_length=ROLLBACKS_KEPT)
    forgotten: Incarnation = NEVER

    def counts(self, held: Held) -> bool:
        """Whether a piece belongs to the history that training has gone on from."""
        return held.written >= self.forgotten and not any(
            held.written < rollback.incarnation and held.step > rollback.step for rollback in self.rollbacks
        )

    def joined(self, others: Iterable["Lineage"]) -> "Lineage":
        """Return what this and the others know together."""
        lineages = [self, *others]
        known = {rollback.incarnation: rollback for lineage in lineages for rollback in lineage.rollbacks}
        kept: list[Rollback] = []
        for _, rollback in sorted(known.items(), reverse=True):
            if not kept or rollback.step < kept[-1].step:
                kept.append(rollback)
        forgotten = max(lineage.forgotten for lineage in lineages)
        if len(kept) > ROLLBACKS_KEPT:
            forgotten = max(forgotten, kept[ROLLBACKS_KEPT].incarnation)
        return Lineage(rollbacks=tuple(reversed(kept[:ROLLBACKS_KEPT])), forgotten=forgotten)

    def rolled_back(self, incarnation: Incarnation, step: int) -> "Lineage":
        """Return what is known after ``incarnation`` has gone on from ``step``."""
        return self.joined([Lineage(rollbacks=(Rollback(incarnation=incarnation, step=step),))])


def complete_layers(pieces: Iterable[Piece]) -> Mapping[int, int]:
    """Return the layers of which all shares are among ``pieces``, with their number of shares.

    A layer may be there in several ways, after the number of pipelines has changed: the fewest shares count.
    """
    found: dict[tuple[int, int], set[int]] = {}
    for piece in pieces:
        found.setdefault((piece.layer, piece.shares), set()).add(piece.share)
    layers: dict[int, int] = {}
    for (layer, shares), present in found.items():
        if len(present) == shares:
            layers[layer] = min(shares, layers.get(layer, shares))
    return layers
