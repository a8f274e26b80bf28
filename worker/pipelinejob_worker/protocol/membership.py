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

    With ``recovery.strategy`` Ladder the epoch grows when the shape, the address of rank 0 or the leavers change, and
    not when the pod of another rank is replaced. Whoever writes an action that is newer than Run and Stop raises
    ``oldest_reader``.
    """

    protocol_version: int = PROTOCOL_VERSION
    oldest_reader: int = OLDEST_READER
    epoch: int = Field(ge=1)
    action: Literal["Run", "Stop", "Leave", "Standby"] = Field(
        description="Leave: only give what is held, until released. Standby: a spare; both since protocol 4."
    )
    stage: int = Field(ge=0)
    stages: int = Field(ge=1)
    pipeline: int = Field(0, ge=0, description="Which data-parallel copy of the pipeline; since protocol 3.")
    pipelines: int = Field(1, ge=1, description="How many copies there are; since protocol 3.")
    master_address: str
    master_port: int
    previous_address: str = ""
    next_address: str = ""
    leavers: int = Field(0, ge=0, description="Agents that only give what they hold in this epoch; since protocol 4.")
    leaver: int = Field(0, ge=0, description="With Leave: which of them this is; since protocol 4.")

    @property
    def rank(self) -> int:
        """Place in the whole group: the stages of pipeline 0, then those of pipeline 1, ...; then those that leave."""
        if self.action == "Leave":
            return self.world_size + self.leaver
        return self.pipeline * self.stages + self.stage

    @property
    def world_size(self) -> int:
        """Stages of all pipelines."""
        return self.pipelines * self.stages
