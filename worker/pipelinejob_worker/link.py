"""What an agent and its worker process tell each other: JSON lines over a socket pair.

Down: one ``Assignment``, later perhaps ``Drain``. Up: ``Joined``, ``Reached`` and, before a failure,
``Failed``.
"""

import json
import select
import socket
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from pipelinejob_worker.protocol import Membership, Progress, WorkerConfig
from pipelinejob_worker.protocol.base import Wire

LINE_LIMIT_BYTES = 1 << 20
"""Longest line either way; the progress of 512 stages with many chunks needs less than a quarter of it."""


class Assignment(Wire):
    """The group to join and the job to train; ``checkpoint_directory`` is empty when there is no volume."""

    kind: Literal["assignment"] = "assignment"
    membership: Membership
    config: WorkerConfig
    attempt: int = Field(0, ge=0)
    checkpoint_directory: str = ""
    scratch_directory: str = ""


class Drain(Wire):
    """Stop at the next step boundary, all stages together."""

    kind: Literal["drain"] = "drain"


class Joined(Wire):
    """The worker is in the group and trains its layers."""

    kind: Literal["joined"] = "joined"
    layers: str


class Reached(Wire):
    """The pipeline has finished a step."""

    kind: Literal["reached"] = "reached"
    progress: Progress


class Failed(Wire):
    """Why the worker is about to exit with a code other than 0."""

    kind: Literal["failed"] = "failed"
    reason: str
    message: str


Event = Joined | Reached | Failed
EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])


class AgentGoneError(Exception):
    """The agent closed the link or died: nobody supervises this worker any more."""


class AgentLink:
    """The worker's end of the link. Not for use by several threads."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._received = b""
        self._drain = False

    def assignment(self) -> Assignment:
        """Block until the agent has handed over the assignment.

        Raises AgentGoneError when the agent ends before.
        """
        while (line := self._take_line()) is None:
            self._receive()
        return Assignment.model_validate_json(line)

    def drain_requested(self) -> bool:
        """Tell, without blocking, whether the agent has asked for a drain.

        Raises AgentGoneError when the agent has ended.
        """
        while select.select([self._connection], [], [], 0)[0]:
            self._receive()
        while (line := self._take_line()) is not None:
            self._drain = self._drain or json.loads(line).get("kind") == Drain().kind
        return self._drain

    def send(self, event: Event) -> None:
        """Send one event; raises AgentGoneError when nobody listens."""
        try:
            self._connection.sendall(event.to_json().encode() + b"\n")
        except (BrokenPipeError, ConnectionResetError) as error:
            raise AgentGoneError("the agent has closed the link") from error

    def _receive(self) -> None:
        data = self._connection.recv(65536)
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
