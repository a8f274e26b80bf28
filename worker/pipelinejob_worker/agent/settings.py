"""Where an agent finds and leaves things."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.protocol import (
    CHECKPOINT_DIRECTORY,
    COORDINATOR_PORT,
    PIECES_PORT,
    POD_INFO_DIRECTORY,
    RECOVERY_DIRECTORY,
    SCRATCH_DIRECTORY,
    STATUS_PORT,
    TERMINATION_LOG,
    Env,
)

DRAIN_SECONDS = 25.0
"""Time that a drain may take: some seconds less than the 30 after which the kubelet kills a pod."""


@dataclass(frozen=True)
class Settings:
    """Who this agent is, and its surroundings.

    ``stage`` and ``pipeline`` are those that the pod was made for, 0 in a spare.
    """

    job: str
    job_uid: str
    stage: int
    attempt: int
    pipeline: int = 0
    spare: bool = False
    address: str = ""
    node: str = ""
    pod_info: Path = Path(POD_INFO_DIRECTORY)
    checkpoint_directory: Path = Path(CHECKPOINT_DIRECTORY)
    scratch_directory: Path = Path(SCRATCH_DIRECTORY)
    termination_log: Path = Path(TERMINATION_LOG)
    status_port: int = STATUS_PORT
    recovery_directory: Path = Path(RECOVERY_DIRECTORY)
    coordinator_port: int = COORDINATOR_PORT
    pieces_port: int = PIECES_PORT
    entry: str = ""
    """Function that workers call in place of the one that the job's configuration demands."""

    drain_seconds: float = DRAIN_SECONDS


def from_environment(environment: Mapping[str, str]) -> Settings:
    """Read who this agent is. Raises ConfigurationError that names the variable."""
    spare = Env.SPARE in environment
    return Settings(
        job=environment.get(Env.JOB, ""),
        job_uid=environment.get(Env.JOB_UID, ""),
        stage=_integer(environment, Env.PIPELINE_STAGE, "0" if spare else ""),
        attempt=_integer(environment, Env.ATTEMPT, "0"),
        pipeline=_integer(environment, Env.PIPELINE_INDEX, "0"),
        spare=spare,
        address=environment.get(Env.POD_IP, ""),
        node=environment.get(Env.NODE, ""),
    )


def _integer(environment: Mapping[str, str], name: Env, default: str = "") -> int:
    value = environment.get(name, default)
    if not (value.isascii() and value.isdigit()):
        raise ConfigurationError(
            f"{name}: '{value}' is not a number; allowed: 0 or more; start the pod through a PipelineJob"
        )
    return int(value)
