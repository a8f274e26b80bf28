"""What agents and the agent of rank 0, which coordinates, tell each other: JSON lines over TCP.

Up: ``Join``, ``Holds``, ``Applied``, ``Broken``, ``Settled``, ``Finished``. Down: ``Plan``, ``Start``, ``Abort``,
``Refused``, ``Released``, ``Done``. Both ways: ``Beat``.
"""

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from pipelinejob_worker.protocol import FailureRecord
from pipelinejob_worker.protocol.base import Wire
from pipelinejob_worker.recovery.agreement import Holding
from pipelinejob_worker.recovery.cut import Cut
from pipelinejob_worker.recovery.pieces import Held, Incarnation, Lineage
from pipelinejob_worker.recovery.transport import Address

LINE_LIMIT_BYTES = 16 << 20
"""Longest line: a plan that names where 50,000 pieces are needs less."""

MAX_RANKS = 65_536
MAX_PIECES = 100_000
FAILURES_TOLD = 4

Rank = Annotated[int, Field(ge=0, lt=MAX_RANKS)]
Text = Annotated[str, Field(max_length=1024)]
Port = Annotated[int, Field(ge=0, lt=65_536)]


class Join(Wire):
    """A rank is there, has no worker in a group, and holds these pieces.

    Ranks from ``world_size`` on are leaving: they only give what they hold, and are not waited for any more once a
    member says that ``present`` is ``world_size``.
    """

    kind: Literal["join"] = "join"
    job_uid: str = Field(max_length=128)
    epoch: int = Field(ge=1)
    rank: Rank
    world_size: int = Field(ge=1, le=MAX_RANKS, description="Ranks that train.")
    present: int = Field(ge=1, le=MAX_RANKS, description="Ranks that must join, those that leave included.")
    node: str = Field("", max_length=253)
    address: Address = Field(description="Where this rank serves its pieces.")
    last: Incarnation = Field(description="The newest incarnation whose plan this rank has applied.")
    lineage: Lineage = Lineage()
    held: list[Held] = Field([], max_length=MAX_PIECES)
    cut: Cut | None = Field(None, description="Of the last incarnation of the same shape that this rank was in.")
    failures: tuple[FailureRecord, ...] = Field(
        (), max_length=FAILURES_TOLD, description="This rank's newest, for the status of rank 0."
    )


class Holds(Wire):
    """What a rank holds by now: a copy has come to it after it had joined, from a rank that leaves."""

    kind: Literal["holds"] = "holds"
    held: list[Held] = Field(max_length=MAX_PIECES)


class Applied(Wire):
    """The plan is written down, and what it makes void is invalid."""

    kind: Literal["applied"] = "applied"
    incarnation: Incarnation


class Broken(Wire):
    """This rank's part of the incarnation has ended. ``own``: by its own fault, not because it lost a peer."""

    kind: Literal["broken"] = "broken"
    incarnation: Incarnation
    reason: str = Field(max_length=128)
    message: Text = ""
    own: bool


class Settled(Wire):
    """Every rank holds a step that this incarnation has computed: what was kept of others is not needed any more."""

    kind: Literal["settled"] = "settled"
    incarnation: Incarnation


class Finished(Wire):
    """This rank's worker has done the last step, and saved what is to be saved."""

    kind: Literal["finished"] = "finished"
    incarnation: Incarnation


class Beat(Wire):
    """Whoever sends it lives."""

    kind: Literal["beat"] = "beat"


class Plan(Wire):
    """A new incarnation, the same for all ranks."""

    kind: Literal["plan"] = "plan"
    incarnation: Incarnation
    step: int | None = Field(
        None, ge=0, description="Finished steps to go on from; None: the checkpoint, or the beginning."
    )
    lineage: Lineage
    holdings: list[Holding] = Field(max_length=2 * MAX_PIECES, description="Who holds what of that step.")
    addresses: list[Address] = Field(max_length=MAX_RANKS, description="Where each rank serves its pieces.")
    guards: list[Rank | None] = Field(max_length=MAX_RANKS, description="Which rank guards each one that trains.")
    rendezvous_port: Port = Field(description="Where rank 0 listens for the process group.")
    cut: Cut | None = Field(None, description="Where to cut the model; None: the workers find out.")


class Start(Wire):
    """All ranks have applied the plan: the workers may form their group."""

    kind: Literal["start"] = "start"
    incarnation: Incarnation


class Abort(Wire):
    """The incarnation is over: leave the group and join again. Who broke it, as far as is known now."""

    kind: Literal["abort"] = "abort"
    incarnation: Incarnation
    rank: Rank
    reason: Text
    own: bool


class Refused(Wire):
    """This rank cannot join; try again later, perhaps with another membership."""

    kind: Literal["refused"] = "refused"
    reason: Text


class Released(Wire):
    """To a rank that leaves: it has given all that is needed of it."""

    kind: Literal["released"] = "released"


class Done(Wire):
    """All ranks have finished: the job is done."""

    kind: Literal["done"] = "done"


ToCoordinator = Join | Holds | Applied | Broken | Settled | Finished | Beat
ToMember = Plan | Start | Abort | Refused | Released | Done | Beat
TO_COORDINATOR: TypeAdapter[ToCoordinator] = TypeAdapter(Annotated[ToCoordinator, Field(discriminator="kind")])
TO_MEMBER: TypeAdapter[ToMember] = TypeAdapter(Annotated[ToMember, Field(discriminator="kind")])


def to_line(message: Wire) -> bytes:
    """Render one message as a line."""
    return message.to_json().encode() + b"\n"
