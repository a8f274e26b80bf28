"""What an agent tells: its status over HTTP, and why it ended in its termination message."""

from typing import Literal

from pydantic import Field

from pipelinejob_worker.protocol.base import Wire
from pipelinejob_worker.protocol.environment import OLDEST_READER, PROTOCOL_VERSION
from pipelinejob_worker.protocol.recovery import (
    FAILURES_KEPT,
    FailureRecord,
    ProtectionStatus,
    RecoveryStatus,
    Traffic,
)
from pipelinejob_worker.protocol.serve import Serving

AgentState = Literal["Waiting", "Standby", "Starting", "Running", "Recovering", "Draining", "Succeeded", "Failed"]
"""``Recovering``: it has run, and waits for the next incarnation of its group. ``Standby``: a spare that could start a
worker at once. Both since protocol 4.
"""

TERMINATION_LIMIT_BYTES = 4096
"""The kubelet keeps no more of a termination message."""


class StageTiming(Wire):
    """Where one stage's time went in the last steps, in percent of the step; a mean over the pipelines.

    ``busy_percent`` is the sum of forward, backward and weight; what is missing to 100 with the others went into
    the loop itself. ``layers`` names the chunks, for instance ``0-2,9-11``.
    """

    stage: int
    busy_percent: int
    layers: str = ""
    forward_percent: int | None = Field(None, description="Forward passes; since protocol 3.")
    backward_percent: int | None = Field(None, description="Backward passes, the inputs' part if they are split.")
    weight_percent: int | None = Field(None, description="The weights' part of split backward passes.")
    update_percent: int | None = Field(None, description="Agreeing on the step and updating the weights.")
    waiting_percent: int | None = Field(None, description="Waiting for another stage's message: the bubble.")
    sending_percent: int | None = Field(None, description="Handing messages over.")


class Progress(Wire):
    """How far the pipeline is. Every stage knows it: the step's all-reduce carries it."""

    step: int = 0
    total_steps: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None
    bubble_percent: float | None = Field(None, description="Measured idle share of the stages, 0 to 100.")
    bubble_limit_percent: float | None = Field(None, description="What the schedule allows at best, 0 to 100.")
    bubble_predicted_percent: float | None = Field(
        None, description="What the partition promised before the first step, 0 to 100; since protocol 3."
    )
    step_seconds: float | None = Field(None, description="Measured time of a step; since protocol 3.")
    step_predicted_seconds: float | None = Field(None, description="What the partition promised; since protocol 3.")
    model_flops_percent: float | None = Field(
        None, description="Model FLOPs utilization (MFU), 0 to 100; only where the device's peak is known."
    )
    model_tera_flops: float | None = Field(None, description="Model FLOPs a second over all stages, in 10**12.")
    validation_loss: float | None = Field(None, description="Newest loss of the validation split; since protocol 3.")
    validation_step: int = Field(0, description="Steps that were finished when it was measured.")
    skipped_steps: int = Field(0, description="Steps of this incarnation without update because float16 overflowed.")
    checkpoint_problem: str = Field("", description="Why the newest checkpoint was not written or not used, in words.")
    checkpoint_damaged: bool = Field(False, description="Whether it was not used, because it is damaged.")
    remaining_seconds: float | None = None
    last_checkpoint_step: int = 0
    stages: tuple[StageTiming, ...] = ()
    serving: Serving | None = Field(None, description="Of the own pipeline of a Serve or Batch job; since protocol 4.")


class AgentStatus(Wire):
    """Answer of ``GET /status``."""

    protocol_version: int = PROTOCOL_VERSION
    oldest_reader: int = OLDEST_READER
    job_uid: str
    stage: int
    epoch: int
    state: AgentState
    layers: str = ""
    progress: Progress = Field(default_factory=Progress)
    incarnation_attempt: int = Field(0, description="Which life of the group within the epoch; since protocol 4.")
    worker_restarts: int = Field(0, description="Workers that were started anew in this pod; since protocol 4.")
    failures: tuple[FailureRecord, ...] = Field(
        (), max_length=FAILURES_KEPT, description="The newest that this agent knows, of any rank; since protocol 4."
    )
    protection: ProtectionStatus = Field(default_factory=ProtectionStatus, description="Since protocol 4.")
    traffic: Traffic = Field(default_factory=Traffic, description="Since protocol 4.")
    recovery: RecoveryStatus = Field(default_factory=RecoveryStatus, description="Since protocol 4.")
    released: bool = Field(False, description="Whether a leaving pod has given all it holds; since protocol 4.")
    refused: str = Field("", description="Why it may not join its group yet, empty if it may; since protocol 4.")


class Termination(Wire):
    """Why an agent ended, written as JSON to the container's termination message."""

    stage: int
    exit_code: int
    reason: str
    message: str = ""
    step: int = 0
    progress: Progress | None = Field(None, description="Where it stood at its end; since protocol 2.")
    log_tail: tuple[str, ...] = ()
