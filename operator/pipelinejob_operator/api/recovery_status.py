"""What the status tells of recovery: the present group, how well the state is protected, and nodes that failed."""

from typing import Annotated, Any

from pydantic import Field

from pipelinejob_worker.protocol.base import Wire

_ATOMIC: dict[str, Any] = {"x-kubernetes-list-type": "atomic"}
_TIME: dict[str, Any] = {"format": "date-time"}
PodName = Annotated[str, Field(max_length=253)]
MAX_AVOIDED = 64


class Move(Wire):
    """A pod that has taken another place than it was made for."""

    pod: PodName
    stage: int
    pipeline: int = 0
    replacement: int = Field(0, description="Which pod of that place it counts as.")


class GroupStatus(Wire):
    """The stages that train together, as their memberships say. Written before any membership."""

    stages: int
    pipelines: int = 1
    master_address: str = Field("", max_length=64, description="Address of stage 0, where the agents meet.")
    leavers: list[PodName] = Field(
        [],
        max_length=512,
        description="Pods that only give what they hold; in the order of their ranks.",
        json_schema_extra=_ATOMIC,
    )
    released: list[PodName] = Field(
        [], max_length=512, description="Those of them that have given all.", json_schema_extra=_ATOMIC
    )
    moves: list[Move] = Field(
        [], max_length=512, description="Pods with another place than they had.", json_schema_extra=_ATOMIC
    )
    stopping_since: str | None = Field(
        None, description="When the stages were told to stop with a checkpoint.", json_schema_extra=_TIME
    )


class Protection(Wire):
    """How many steps a loss would cost."""

    step: int = Field(0, description="Step of the newest snapshot.")
    guarded_step: int = Field(0, description="Newest step that is in the memory of two pods.")
    interval_steps: int = Field(0, description="Steps between two snapshots.")
    at_risk_steps: int = Field(0, description="Steps that the loss of a node would cost, beside the one in flight.")
    cost_percent: int | None = Field(None, description="Share of the time that snapshots take.")


class LastRecovery(Wire):
    """The last recovery or rescale of the running group."""

    pause_milliseconds: int | None = Field(
        None, description="From the end of one incarnation of the group to the first step of the next."
    )
    resumed_step: int = Field(0, description="Finished steps that it went on from.")
    repeated_steps: int = Field(0, description="Finished steps that were computed again.")


class AvoidedNode(Wire):
    """A node on which stages of this job failed; after the second time later pods take it last, until it expires."""

    name: PodName
    failures: int = Field(description="Failures on it within recovery.windowSeconds of each other.")
    last_failure_time: str = Field(description="When the last one was seen.", json_schema_extra=_TIME)
