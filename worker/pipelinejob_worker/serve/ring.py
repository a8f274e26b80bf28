"""Forming the ring of stages: each connects to the next, and the last one to stage 0. Then they compare notes.

Everything here is JSON behind its length; what follows on the same connections is ``hop``'s.
"""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pipelinejob_worker.serve.hop import Bounds, Hop, HopError, tune

CONNECT_RETRY_SECONDS = 0.05
LOOK_SECONDS = 0.1
"""How often a stage that waits for a neighbour looks whether it is to leave."""

STRANGER_SECONDS = 1.0
"""Who connects and says nothing for so long is nobody."""

GREETING_LIMIT_BYTES = 8192
NOTES_LIMIT_BYTES = 4 << 20
"""Of what all stages tell each other at a time; each tells some kilobytes."""

_LENGTH = struct.Struct("<I")

Address = tuple[str, int]


@dataclass(frozen=True)
class Member:
    """A stage's place in one epoch of the group."""

    epoch: int
    stage: int
    stages: int
    next_address: Address | None = None
    """Host and port at which the next stage waits, for the last one stage 0; None where there is but one."""

    @property
    def last(self) -> bool:
        """Whether this is the stage that draws the tokens."""
        return self.stage == self.stages - 1


class Departure:
    """The order to leave the group. It can come from any thread; whoever waits for a neighbour gets HopError then."""

    def __init__(self, says: Callable[[bool], None] = lambda _: None) -> None:
        """``says``: told by the main thread whether it waits for others or computes, at least once a second while it
        waits; it may raise.
        """
        self._says = says
        self._lock = threading.Lock()
        self._connections: list[socket.socket] = []
        self.ordered = False

    def order(self) -> None:
        """Leave now. A further order does no harm."""
        with self._lock:
            self.ordered = True
            for connection in self._connections:
                _shut(connection)

    def ends(self, connection: socket.socket) -> socket.socket:
        """Have the order end this connection."""
        with self._lock:
            self._connections.append(connection)
            if self.ordered:
                _shut(connection)
        return connection

    def waits(self) -> None:
        """Say that this stage is about to wait for others. Raises HopError if the order has been given."""
        self._says(True)
        if self.ordered:
            raise HopError("this stage was told to leave")

    def computes(self) -> None:
        """Say that this stage is about to compute, or to load."""
        self._says(False)


@dataclass(frozen=True)
class Ring:
    """The connections of one stage for batches. With one stage there are none."""

    blocks: int
    """Of the cache, as many as the stage with the fewest has."""

    before: Hop | None
    after: Hop | None

    def close(self) -> None:
        """Close both; the neighbours notice at once."""
        for hop in (self.before, self.after):
            if hop:
                hop.close()


class Circle:
    """The stages that have met, before they serve: each can tell all others something."""

    def __init__(self, member: Member, before: socket.socket | None, after: socket.socket | None) -> None:
        self.member = member
        self._before = before
        self._after = after

    def exchange(self, note: dict[str, Any], seconds: float) -> list[dict[str, Any]]:
        """Return what each stage says here, in their order; all call this equally often. Raises HopError.

        ``seconds``: how long a stage waits for the others, which may have to load their layers first.
        """
        if not (self._before and self._after):
            return [note]
        for connection in (self._before, self._after):
            connection.settimeout(seconds)
        try:
            said = [] if self.member.stage == 0 else self._receive(self._before, self.member.stage)
            _send(self._after, [*said, note])
            every = self._receive(self._before, self.member.stages)
            if not self.member.last:
                _send(self._after, every)
        except OSError as error:
            raise HopError(f"stage {self.member.stage} has lost a neighbour: {error}") from error
        for connection in (self._before, self._after):
            connection.settimeout(None)
        return every

    def ring(self, bounds: Bounds) -> Ring:
        """Return the same connections for batches within ``bounds``, which are those of all stages."""
        hops = [Hop(connection, bounds) if connection else None for connection in (self._before, self._after)]
        return Ring(bounds.blocks, *hops)

    def close(self) -> None:
        """Close both; the neighbours notice at once."""
        for connection in (self._before, self._after):
            if connection:
                _shut(connection)
                connection.close()

    def _receive(self, connection: socket.socket, count: int) -> list[dict[str, Any]]:
        notes = _receive(connection, NOTES_LIMIT_BYTES)
        if not (isinstance(notes, list) and len(notes) == count and all(isinstance(note, dict) for note in notes)):
            raise HopError(f"a neighbour sent no notes of {count} stages")
        return notes


def form(member: Member, listener: socket.socket, fingerprint: str, deadline: float, departure: Departure) -> Circle:
    """Meet the neighbours by ``deadline``, in seconds of ``time.monotonic``.

    ``fingerprint``: what all stages must have in common. Raises HopError; others' connections are refused.
    """
    if member.next_address is None:
        departure.waits()
        return Circle(member, None, None)
    before: socket.socket | None = None
    after: socket.socket | None = None
    try:
        # Stage 0 connects first and all others accept first, so one after the other meets its neighbours.
        if member.stage == 0:
            after = _connect(member, member.next_address, fingerprint, deadline, departure)
        before = _accept(listener, member, fingerprint, deadline, departure)
        if member.stage != 0:
            after = _connect(member, member.next_address, fingerprint, deadline, departure)
        return Circle(member, before, after)
    except (OSError, HopError) as error:
        for connection in (before, after):
            if connection:
                connection.close()
        raise HopError(f"stage {member.stage} of epoch {member.epoch} does not meet its neighbours: {error}") from error


def _connect(
    member: Member, address: Address, fingerprint: str, deadline: float, departure: Departure
) -> socket.socket:
    """Connect as soon as the other end listens and is in the same epoch."""
    greeting = {"epoch": member.epoch, "stage": member.stage, "fingerprint": fingerprint}
    problem = "it does not listen"
    while True:
        departure.waits()
        try:
            connection = departure.ends(socket.create_connection(address, timeout=_left(deadline, problem)))
        except OSError as error:
            problem = str(error)
        else:
            try:
                tune(connection)
                _send(connection, greeting)
                connection.settimeout(_left(deadline, problem))
                answer = _receive(connection, GREETING_LIMIT_BYTES)
            except OSError as error:
                problem = f"it does not answer: {error}"
            except HopError as error:
                problem = str(error)
            else:
                if answer == {"fingerprint": fingerprint}:
                    return connection
                connection.close()
                raise _different(member.stage, fingerprint, answer)
            connection.close()
        if time.monotonic() + CONNECT_RETRY_SECONDS >= deadline:
            raise HopError(f"no stage of epoch {member.epoch} at {address[0]}:{address[1]}: {problem}")
        time.sleep(CONNECT_RETRY_SECONDS)


def _accept(
    listener: socket.socket, member: Member, fingerprint: str, deadline: float, departure: Departure
) -> socket.socket:
    """Wait for the stage before, and pass over whoever else connects: stages of another epoch, strangers."""
    stage_before = (member.stage - 1) % member.stages
    while True:
        departure.waits()
        listener.settimeout(min(LOOK_SECONDS, _left(deadline, f"stage {stage_before} does not come")))
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        departure.ends(connection)
        other = _greeting(connection)
        if (other.get("epoch"), other.get("stage")) == (member.epoch, stage_before):
            with suppress(OSError):  # then it is seen below, or has gone and comes again
                _send(connection, {"fingerprint": fingerprint})
                if other.get("fingerprint") == fingerprint:
                    return connection
            connection.close()
            if other.get("fingerprint") != fingerprint:
                raise _different(member.stage, fingerprint, other)
        connection.close()


def _greeting(connection: socket.socket) -> dict[str, Any]:
    """Return what a stage says first, or an empty object if this is none."""
    try:
        tune(connection)
        connection.settimeout(STRANGER_SECONDS)
        greeting = _receive(connection, GREETING_LIMIT_BYTES)
    except (OSError, HopError):
        return {}
    return greeting if isinstance(greeting, dict) else {}


def _different(stage: int, own: str, greeting: Any) -> HopError:
    other = greeting.get("fingerprint") if isinstance(greeting, dict) else greeting
    return HopError(
        f"a neighbour serves {other!r} and stage {stage} {own!r}; all stages must have one model and one configuration"
    )


def _send(connection: socket.socket, value: Any) -> None:
    content = json.dumps(value, separators=(",", ":")).encode()
    connection.sendall(_LENGTH.pack(len(content)) + content)


def _receive(connection: socket.socket, limit: int) -> Any:
    """Raises OSError, HopError when it is no message."""
    (size,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    if size > limit:
        raise HopError(f"a neighbour announced {size} bytes; allowed: at most {limit}")
    try:
        return json.loads(_exactly(connection, size))
    except ValueError as error:
        raise HopError("a neighbour sent what is no JSON") from error


def _exactly(connection: socket.socket, size: int) -> bytes:
    """Read not a byte more: what follows is not for us."""
    received = bytearray()
    while len(received) < size:
        data = connection.recv(min(size - len(received), 1 << 16))
        if not data:
            raise ConnectionResetError("the other end has closed the connection")
        received += data
    return bytes(received)


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):  # the other end was faster
        connection.shutdown(socket.SHUT_RDWR)


def _left(deadline: float, problem: str) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise HopError(f"the stages did not meet in time: {problem}")
    return left
