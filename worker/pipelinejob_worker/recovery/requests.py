"""What agents ask of each other about pieces.

A connection begins with a ``Greeting`` and its answer. Then the client sends one request after another: ``Reserve``,
``Put`` and, if that is accepted, the payload, ``Get``, ``Doubt``.
"""

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from pipelinejob_worker.protocol.base import Wire
from pipelinejob_worker.recovery.pieces import MAX_LAYERS, Held, Incarnation, Piece

Size = Annotated[int, Field(ge=0, lt=1 << 48)]


class Greeting(Wire):
    """Who connects, and in which incarnation."""

    kind: Literal["greeting"] = "greeting"
    job_uid: str = Field(max_length=128)
    incarnation: Incarnation
    rank: int = Field(ge=0)


class Sized(Wire):
    """A piece and the size of its payload."""

    piece: Piece
    size: Size


class Reserve(Wire):
    """Have slots for copies of these pieces."""

    kind: Literal["reserve"] = "reserve"
    pieces: list[Sized] = Field(max_length=MAX_LAYERS)


class Put(Wire):
    """Keep this copy; the payload follows if the answer is ``accepted``."""

    kind: Literal["put"] = "put"
    held: Held
    checksum: int = Field(ge=0, lt=1 << 32)


class Get(Wire):
    """Send a piece; the payload follows the answer ``found``."""

    kind: Literal["get"] = "get"
    held: Held


class Doubt(Wire):
    """What came as this piece has another checksum: look at the slot, and drop it if that is so there too."""

    kind: Literal["doubt"] = "doubt"
    piece: Piece
    step: int = Field(ge=0)
    copied: bool


class Answer(Wire):
    """To every request. ``held``: there is nothing to send, as the guard has it already."""

    result: Literal["done", "accepted", "held", "found", "refused"]
    reason: str = Field("", max_length=1024)
    size: Size = 0
    checksum: int = Field(0, ge=0, lt=1 << 32)


Request = Reserve | Put | Get | Doubt
REQUEST: TypeAdapter[Request] = TypeAdapter(Annotated[Request, Field(discriminator="kind")])
