"""Forming the ring of stages: each connects to the next, and the last one to stage 0."""

import json
import socket
import time
from dataclasses import dataclass, replace

from pipelinejob_worker.serve.hop import Bounds, Hop, HopError, tune

CONNECT_RETRY_SECONDS = 0.05
HELLO_LIMIT_BYTES = 4096


@dataclass(frozen=True)
class Member:
    """A stage's place in one epoch of the group."""

    epoch: int
    stage: int
    addresses: tuple[tuple[str, int], ...]
    """Host and port at which each stage waits for the one before it."""

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.addresses)

    @property
    def last(self) -> bool:
        """Whether this is the stage that draws the tokens."""
        return self.stage == self.stages - 1


@dataclass(frozen=True)
class Ring:
    """The connections of one stage. With one stage there are none."""

    blocks: int
    """Of the cache, as many as the stage with the fewest has; known to stage 0 only, elsewhere of those before."""

    before: Hop | None
    after: Hop | None

    def close(self) -> None:
        """Close both; the neighbours notice at once."""
        for hop in (self.before, self.after):
            if hop:
                hop.close()


def form(member: Member, listener: socket.socket, bounds: Bounds, fingerprint: str, deadline: float) -> Ring:
    """Meet the neighbours by ``deadline``, in seconds of ``time.monotonic``.

    ``bounds.blocks`` is this stage's own number; a greeting goes round the ring and finds the smallest.
    ``fingerprint``: what all stages must have in common. Raises HopError; others' connections are refused.
    """
    if member.stages == 1:
        return Ring(bounds.blocks, None, None)
    opened: list[socket.socket] = []
    try:
        if member.stage == 0:
            opened.append(_connect(member.addresses[1], deadline))
            _greet(opened[0], member, bounds.blocks, fingerprint)
            before, blocks = _accept(listener, member, fingerprint, deadline)
            opened.append(before)
        else:
            before, blocks = _accept(listener, member, fingerprint, deadline)
            opened.append(before)
            blocks = min(blocks, bounds.blocks)
            opened.append(_connect(member.addresses[(member.stage + 1) % member.stages], deadline))
            _greet(opened[1], member, blocks, fingerprint)
    except (OSError, HopError) as error:
        for connection in opened:
            connection.close()
        raise HopError(f"stage {member.stage} of epoch {member.epoch} does not meet its neighbours: {error}") from error
    after = opened[0] if member.stage == 0 else opened[1]
    for connection in opened:
        connection.settimeout(None)
    bounds = replace(bounds, blocks=blocks)
    return Ring(blocks, Hop(before, bounds), Hop(after, bounds))


def _connect(address: tuple[str, int], deadline: float) -> socket.socket:
    """Connect as soon as the other end listens."""
    while True:
        try:
            return socket.create_connection(address, timeout=_left(deadline))
        except ConnectionRefusedError as error:
            if time.monotonic() + CONNECT_RETRY_SECONDS >= deadline:
                raise HopError(f"no stage listens at {address[0]}:{address[1]}") from error
            time.sleep(CONNECT_RETRY_SECONDS)


def _greet(connection: socket.socket, member: Member, blocks: int, fingerprint: str) -> None:
    greeting = {"epoch": member.epoch, "stage": member.stage, "blocks": blocks, "fingerprint": fingerprint}
    connection.sendall(json.dumps(greeting).encode() + b"\n")


def _accept(listener: socket.socket, member: Member, fingerprint: str, deadline: float) -> tuple[socket.socket, int]:
    """Wait for the stage before, and pass over whoever else connects: stages of an earlier epoch, strangers."""
    while True:
        listener.settimeout(_left(deadline))
        connection, _ = listener.accept()
        tune(connection)
        greeting = _greeting(connection, deadline)
        if greeting and greeting[:2] == (member.epoch, (member.stage - 1) % member.stages):
            if greeting[3] != fingerprint:
                connection.close()
                raise HopError(
                    f"stage {greeting[1]} serves {greeting[3]!r} and stage {member.stage} {fingerprint!r}; all stages "
                    "must have one model and one configuration"
                )
            return connection, greeting[2]
        connection.close()


def _greeting(connection: socket.socket, deadline: float) -> tuple[int, int, int, str] | None:
    """Return epoch, stage, blocks and fingerprint; None when it is no greeting."""
    received = b""
    try:
        while not received.endswith(b"\n") and len(received) < HELLO_LIMIT_BYTES:
            connection.settimeout(min(1.0, _left(deadline)))
            data = connection.recv(HELLO_LIMIT_BYTES)
            if not data:
                return None
            received += data
        greeting = json.loads(received)
        return (
            int(greeting["epoch"]),
            int(greeting["stage"]),
            int(greeting["blocks"]),
            str(greeting["fingerprint"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise HopError("the stages did not meet in time")
    return left
