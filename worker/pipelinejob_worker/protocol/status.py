"""What an agent tells: its status over HTTP, and why it ended in its termination message."""

from typing import Literal

from pydantic import Field

from pipelinejob_worker.protocol.base import Wire
from pipelinejob_worker.protocol.environment import OLDEST_READER, PROTOCOL_VERSION

AgentState = Literal["Waiting", "Starting", "Running", "Draining", "Succeeded", "Failed"]

TERMINATION_LIMIT_BYTES = 4096
"""The kubelet keeps no more of a termination message."""


class StageTiming(Wire):
    """Where one stage's time went in the last steps, in percent of the step."""

    stage: int
    busy_percent: int
    layers: str = ""


class Progress(Wire):
    """How far the pipeline is. Every stage knows it: the step's all-reduce carries it."""

    step: int = 0
    total_steps: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None
    bubble_percent: float | None = Field(None, description="Measured idle share of the stages, 0 to 100.")
    bubble_limit_percent: float | None = Field(None, description="What the schedule allows at best, 0 to 100.")
    remaining_seconds: float | None = None
    last_checkpoint_step: int = 0
    stages: tuple[StageTiming, ...] = ()


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


class Termination(Wire):
    """Why an agent ended, written as JSON to the container's termination message."""

    stage: int
    exit_code: int
    reason: str
    message: str = ""
    step: int = 0
    progress: Progress | None = Field(None, description="Where it stood at its end; since protocol 2.")
    log_tail: tuple[str, ...] = ()
