"""The membership: which stages form the pipeline now. The operator writes it, every agent obeys it."""

from typing import Literal

from pydantic import Field

from pipelinejob_worker.protocol.base import Wire
from pipelinejob_worker.protocol.environment import OLDEST_READER, PROTOCOL_VERSION

MEMBERSHIP_LIMIT_BYTES = 4096
"""Longest membership: it is copied into an annotation of every stage pod."""


class Membership(Wire):
    """One incarnation of the group, as one stage needs to know it.

    ``epoch`` grows with every change; an agent ignores anything older than what it has seen. Only what this stage
    needs is here (its own place, its neighbours, the master), so the size does not grow with the number of stages.
    """

    protocol_version: int = PROTOCOL_VERSION
    oldest_reader: int = OLDEST_READER
    epoch: int = Field(ge=1)
    action: Literal["Run", "Stop"]
    stage: int = Field(ge=0)
    stages: int = Field(ge=1)
    master_address: str
    master_port: int
    previous_address: str = ""
    next_address: str = ""
