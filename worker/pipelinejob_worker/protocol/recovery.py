"""Recovery among the agents: what the operator sets, and what an agent tells of it. All since protocol 4."""

from typing import Annotated, Literal

from pydantic import Field

from pipelinejob_worker.protocol.base import Wire

RECOVERY_SINCE = 4
"""Protocol of the first agents that recover by themselves."""

FAILURES_KEPT = 16
"""Most failures that a status tells."""

FAILURE_TEXT_CHARACTERS = 1024
FAILURE_TAIL_LINES = 8

RecoveryStrategy = Literal["Ladder", "RecreateAll"]


class Recovery(Wire):
    """How a stage answers failures; a member of the worker's configuration.

    Without it, as an operator of protocol 3 writes it, a failure of one stage ends all, and the operator makes the pods
    anew: ``RecreateAll``.
    """

    strategy: RecoveryStrategy = "RecreateAll"
    snapshot_every_steps: int = Field(
        0, ge=0, le=1_000_000, description="Steps between two snapshots; 0: as few as cost at most 3 % of the time."
    )
    hang_timeout_seconds: int = Field(
        0, ge=0, le=86_400, description="Time after which a step counts as hung; 0: several times the slowest of late."
    )
    max_restarts: int = Field(10, ge=0, le=1000, description="Ends of the worker that are answered within the window.")
    window_seconds: int = Field(3600, ge=1, le=2_592_000)
    memory_bytes: int = Field(0, ge=0, description="Most that snapshots may take; 0: what the volume has.")


class FailureRecord(Wire):
    """A worker or an agent ended that should not have."""

    rank: int = Field(ge=0)
    at: float = Field(ge=0, description="Unix time in seconds.")
    exit_code: int = Field(1, description="128 + the number of the signal, if one ended it.")
    signal: str = Field("", max_length=32, description="Its name, for instance SIGSEGV.")
    reason: str = Field(max_length=128, description="CamelCase: Signal, Hung, Error, OOMKilled, ContainerLost, ...")
    message: str = Field("", max_length=FAILURE_TEXT_CHARACTERS)
    step: int = Field(0, ge=0, description="Steps that were finished.")
    node: str = Field("", max_length=253)
    epoch: int = Field(0, ge=0)
    attempt: int = Field(0, ge=0, description="The incarnation that it ended, within its epoch.")
    log_tail: tuple[Annotated[str, Field(max_length=512)], ...] = Field((), max_length=FAILURE_TAIL_LINES)


class ProtectionStatus(Wire):
    """How well the newest steps are kept."""

    step: int = Field(0, description="Step of the newest snapshot in this pod.")
    guarded_step: int = Field(0, description="Newest step of which this rank's snapshot is in another pod, too.")
    interval_steps: int = Field(0, description="Steps between two snapshots.")
    at_risk_steps: int = Field(0, description="Steps that the loss of a node would cost, beside the one in flight.")
    cost_percent: float | None = Field(None, description="Measured share of the time that snapshots take.")
    problem: str = Field("", description="Why steps are not protected: what is needed, and what is allowed.")


class Traffic(Wire):
    """Payload of snapshots between pods, since this agent began."""

    pieces_sent_bytes: int = 0
    pieces_received_bytes: int = 0
    pieces_fetched_bytes: int = Field(
        0, description="Of those received, the part that this pod has taken over from others, and not the copies."
    )


class RecoveryStatus(Wire):
    """The last recovery or rescale."""

    last_pause_seconds: float | None = Field(
        None, description="From the end of one incarnation to the first step of the next."
    )
    resumed_step: int = Field(0, description="Finished steps that it went on from.")
    steps_repeated: int = Field(0, description="Finished steps that were computed again.")
