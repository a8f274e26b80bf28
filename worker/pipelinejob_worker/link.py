"""What an agent and its worker process tell each other: JSON lines over a socket pair.

Down: an ``Assignment`` for each incarnation of the group, then perhaps ``Fetched``, ``Guarded`` and ``Drain``. Up:
``Divided``, ``Joined``, ``Reached``, ``Valid``, at its end ``Left`` or ``Finished`` and, before a failure, ``Failed``.
"""

import os
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from pipelinejob_worker.protocol import Membership, Progress, ProtectionStatus, WorkerConfig
from pipelinejob_worker.protocol.base import Wire
from pipelinejob_worker.recovery.cut import Cut
from pipelinejob_worker.recovery.pieces import Incarnation

LINE_LIMIT_BYTES = 1 << 20
"""Longest line either way; the progress of 512 stages with many chunks needs less than a quarter of it."""

POLL_SECONDS = 0.05
"""How often a wait for the agent looks whether the worker has to leave."""

_DESCRIPTORS = 4


class Part(Wire):
    """This worker's part in one incarnation, where the agents recover by themselves."""

    incarnation: Incarnation
    rendezvous_port: int = Field(description="Of the store on rank 0, whose worker gets the listening socket itself.")
    step: int | None = Field(None, description="Finished steps to go on from; None: the checkpoint, or the beginning.")
    cut: Cut | None = Field(None, description="Where to cut the model; None: find out.")
    directory: str = Field(description="Where the slots of snapshots are.")
    memory_bytes: int = Field(description="Most that they may take.")
    pulse: str = Field(description="File of the signs of life.")
    addresses: tuple[str, ...] = Field((), description="Of this pod and of the next stage's, as the agents know them.")


class Assignment(Wire):
    """The group to join and the job to train; ``checkpoint_directory`` is empty when there is no volume.

    Without a ``part`` the worker ends with its group; with one it stays for the next.
    """

    kind: Literal["assignment"] = "assignment"
    membership: Membership
    config: WorkerConfig
    attempt: int = Field(0, ge=0)
    checkpoint_directory: str = ""
    scratch_directory: str = ""
    part: Part | None = None


class Drain(Wire):
    """Stop at the next step boundary, all stages together."""

    kind: Literal["drain"] = "drain"
    checkpoint: bool = Field(True, description="Whether to save a checkpoint, where there is a volume.")


class Fetched(Wire):
    """All pieces of this rank are in its slots."""

    kind: Literal["fetched"] = "fetched"


class Guarded(Wire):
    """The guard holds the snapshot of a step."""

    kind: Literal["guarded"] = "guarded"
    step: int
    seconds: float = Field(0.0, description="How long the copy took.")


class Divided(Wire):
    """The worker is in the group, and knows which layers each rank has: what this one lacks can be fetched."""

    kind: Literal["divided"] = "divided"
    cut: Cut


class Joined(Wire):
    """The worker is in the group and trains its layers."""

    kind: Literal["joined"] = "joined"
    layers: str
    problem: str = Field("", description="Why the newest steps cannot be kept in memory.")


class Reached(Wire):
    """The pipeline has finished a step."""

    kind: Literal["reached"] = "reached"
    progress: Progress
    protection: ProtectionStatus | None = None


class Valid(Wire):
    """The snapshot of a step is complete in this pod's memory."""

    kind: Literal["valid"] = "valid"
    step: int


class Left(Wire):
    """The worker has left its group, and waits for the next assignment."""

    kind: Literal["left"] = "left"
    reason: Literal["Drained", "Ordered", "PeerLost"]
    message: str = ""


class Finished(Wire):
    """The worker has done the last step, has saved what is to be saved, and waits for the next assignment."""

    kind: Literal["finished"] = "finished"


class Failed(Wire):
    """Why the worker is about to exit with a code other than 0."""

    kind: Literal["failed"] = "failed"
    reason: str
    message: str


Order = Assignment | Drain | Fetched | Guarded
Event = Divided | Joined | Reached | Valid | Left | Finished | Failed
ORDER: TypeAdapter[Order] = TypeAdapter(Annotated[Order, Field(discriminator="kind")])
EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])


class AgentGoneError(Exception):
    """The agent closed the link or died: nobody supervises this worker any more."""


class AgentLink:
    """The worker's end of the link. One thread receives; any may send."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._sending = threading.Lock()
        self._received = b""
        self._descriptors: list[int] = []
        self._drain: Drain | None = None
        self._fetched = False
        self._guarded = -1
        self.copy_seconds = 0.0
        """How long the newest copy took to reach the guard."""

    def assignment(self) -> Assignment:
        """Block until the agent has handed over the next assignment; what it has said before is of no use any more.

        Raises AgentGoneError when the agent ends before.
        """
        while True:
            while (line := self._take_line()) is None:
                self._receive()
            order = ORDER.validate_json(line)
            if isinstance(order, Assignment):
                self._drain, self._fetched, self._guarded = None, False, -1
                return order

    def take_listener(self) -> int:
        """Return the descriptor of the socket that came with the assignment to rank 0; the caller owns it."""
        *stale, newest = self._descriptors
        for descriptor in stale:
            os.close(descriptor)
        self._descriptors.clear()
        return newest

    def drain_requested(self) -> Drain | None:
        """Return, without blocking, what drain the agent has asked for.

        Raises AgentGoneError when the agent has ended.
        """
        self._look(0)
        return self._drain

    def wait_fetched(self, waits: Callable[[], object]) -> None:
        """Wait until this rank's pieces are in its slots; ``waits`` is called meanwhile, and may raise."""
        while not self._fetched:
            waits()
            self._look(POLL_SECONDS)

    def wait_guarded(self, step: int, seconds: float, must_leave: Callable[[], bool]) -> bool:
        """Wait until the guard holds the snapshot of ``step``, for ``seconds`` at most; return whether it does."""
        deadline = time.monotonic() + seconds
        self._look(0)
        while self._guarded < step and not must_leave() and (left := deadline - time.monotonic()) > 0:
            self._look(min(left, POLL_SECONDS))
        return self._guarded >= step

    def send(self, event: Event) -> None:
        """Send one event; raises AgentGoneError when nobody listens."""
        try:
            with self._sending:
                self._connection.sendall(event.to_json().encode() + b"\n")
        except (BrokenPipeError, ConnectionResetError) as error:
            raise AgentGoneError("the agent has closed the link") from error

    def _look(self, seconds: float) -> None:
        """Take in what the agent says within ``seconds``."""
        while self._poll.poll(1000 * seconds):
            self._receive()
            seconds = 0
        while (line := self._take_line()) is not None:
            match ORDER.validate_json(line):
                case Drain() as drain:
                    self._drain = drain
                case Fetched():
                    self._fetched = True
                case Guarded(step=step, seconds=seconds):
                    self._guarded, self.copy_seconds = step, seconds

    def _receive(self) -> None:
        data, descriptors, _, _ = socket.recv_fds(self._connection, 65536, _DESCRIPTORS)
        self._descriptors += descriptors
        if not data:
            raise AgentGoneError("the agent has closed the link")
        self._received += data
        if len(self._received) > LINE_LIMIT_BYTES:
            raise AgentGoneError(f"the agent sent more than {LINE_LIMIT_BYTES} bytes without a line end")

    def _take_line(self) -> bytes | None:
        line, separator, rest = self._received.partition(b"\n")
        if not separator:
            return None
        self._received = rest
        return line
