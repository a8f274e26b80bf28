"""All that operator and worker agree on. Imports only pydantic; the operator imports nothing else of the worker."""

from pipelinejob_worker.protocol.environment import (
    CHECKPOINT_DIRECTORY,
    CONFIG_FILE,
    MEMBERSHIP_FILE,
    OLDEST_READER,
    POD_INFO_DIRECTORY,
    PROTOCOL_VERSION,
    RENDEZVOUS_PORT,
    SCRATCH_DIRECTORY,
    STATUS_PORT,
    TERMINATION_LOG,
    TRACE_FILE,
    WORKER_CONTAINER,
    Env,
    ExitCode,
)
from pipelinejob_worker.protocol.job import Checkpoint, WorkerConfig
from pipelinejob_worker.protocol.membership import MEMBERSHIP_LIMIT_BYTES, Membership
from pipelinejob_worker.protocol.model import Argument, HuggingFace, Model, Module, Partition, Preset
from pipelinejob_worker.protocol.status import (
    TERMINATION_LIMIT_BYTES,
    AgentState,
    AgentStatus,
    Progress,
    StageTiming,
    Termination,
)
from pipelinejob_worker.protocol.train import Data, Optimizer, Schedule, ScheduleName, Train

__all__ = [
    "CHECKPOINT_DIRECTORY",
    "CONFIG_FILE",
    "MEMBERSHIP_FILE",
    "MEMBERSHIP_LIMIT_BYTES",
    "OLDEST_READER",
    "POD_INFO_DIRECTORY",
    "PROTOCOL_VERSION",
    "RENDEZVOUS_PORT",
    "SCRATCH_DIRECTORY",
    "STATUS_PORT",
    "TERMINATION_LIMIT_BYTES",
    "TERMINATION_LOG",
    "TRACE_FILE",
    "WORKER_CONTAINER",
    "AgentState",
    "AgentStatus",
    "Argument",
    "Checkpoint",
    "Data",
    "Env",
    "ExitCode",
    "HuggingFace",
    "Membership",
    "Model",
    "Module",
    "Optimizer",
    "Partition",
    "Preset",
    "Progress",
    "Schedule",
    "ScheduleName",
    "StageTiming",
    "Termination",
    "Train",
    "WorkerConfig",
]
