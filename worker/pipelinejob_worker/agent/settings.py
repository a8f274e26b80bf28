"""Where an agent finds and leaves things."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.protocol import (
    CHECKPOINT_DIRECTORY,
    POD_INFO_DIRECTORY,
    SCRATCH_DIRECTORY,
    STATUS_PORT,
    TERMINATION_LOG,
    Env,
)

DRAIN_SECONDS = 25.0
"""Time that a drain may take: some seconds less than the 30 after which the kubelet kills a pod."""

_WORKER = (sys.executable, "-m", "pipelinejob_worker.train")


@dataclass(frozen=True)
class Settings:
    """Who this agent is, and its surroundings."""

    job: str
    job_uid: str
    stage: int
    attempt: int
    pipeline: int = 0
    pod_info: Path = Path(POD_INFO_DIRECTORY)
    checkpoint_directory: Path = Path(CHECKPOINT_DIRECTORY)
    scratch_directory: Path = Path(SCRATCH_DIRECTORY)
    termination_log: Path = Path(TERMINATION_LOG)
    status_port: int = STATUS_PORT
    worker: tuple[str, ...] = _WORKER
    drain_seconds: float = DRAIN_SECONDS


def from_environment(environment: Mapping[str, str]) -> Settings:
    """Read who this agent is. Raises ConfigurationError that names the variable."""
    return Settings(
        job=environment.get(Env.JOB, ""),
        job_uid=environment.get(Env.JOB_UID, ""),
        stage=_integer(environment, Env.PIPELINE_STAGE),
        attempt=_integer(environment, Env.ATTEMPT, "0"),
        pipeline=_integer(environment, Env.PIPELINE_INDEX, "0"),
    )


def _integer(environment: Mapping[str, str], name: Env, default: str = "") -> int:
    value = environment.get(name, default)
    if not (value.isascii() and value.isdigit()):
        raise ConfigurationError(
            f"{name}: '{value}' is not a number; allowed: 0 or more; start the pod through a PipelineJob"
        )
    return int(value)
