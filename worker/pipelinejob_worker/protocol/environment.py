"""Names, paths, ports and exit codes that operator and worker share."""

from enum import IntEnum, StrEnum

PROTOCOL_VERSION = 4
"""Version of what this release writes; it grows when a member is added, or changes its meaning."""

OLDEST_READER = max(1, PROTOCOL_VERSION - 1)
"""Oldest version whose programs can act on what this release writes: the one before, so that an operator can be
upgraded while jobs run. Every document carries it, and a reader refuses what is too new for it. What older programs
write lacks the newer members, so each of these has a default.
"""

WORKER_CONTAINER = "worker"
"""Name of the container in ``spec.template`` that belongs to us."""

STATUS_PORT = 8471
"""TCP port on which each agent serves ``/status``, ``/metrics`` and ``/healthz``."""

RENDEZVOUS_PORT = 29500
"""TCP port of the rendezvous store, on the pod of stage 0. With ``recovery.strategy`` Ladder each incarnation has one
of its own, which rank 0's agent chooses."""

COORDINATOR_PORT = 8472
"""TCP port on which the agent of rank 0 coordinates recovery; since protocol 4."""

PIECES_PORT = 8473
"""TCP port on which each agent takes and gives snapshots; since protocol 4."""

ENGINE_PORT = 8474
"""TCP port on which stage 0 of each pipeline of a Serve job listens for fronts; since protocol 4."""

RING_PORT = 8475
"""TCP port on which each stage of a Serve or Batch job waits for the stage before it; since protocol 4."""

POD_INFO_DIRECTORY = "/etc/pipelinejob"
"""Where the downward-API volume is mounted."""

MEMBERSHIP_FILE = "membership"
"""Name under ``POD_INFO_DIRECTORY`` that holds a ``Membership`` as JSON; empty until the operator writes it."""

CONFIG_FILE = "config"
"""Name under ``POD_INFO_DIRECTORY`` that holds a ``WorkerConfig`` as JSON."""

RECOVERY_DIRECTORY = "/run/pipelinejob"
"""Where the memory-backed volume is mounted that holds snapshots and what an agent writes down; since protocol 4."""

CHECKPOINT_DIRECTORY = "/checkpoint"
"""Where the claim of ``spec.checkpoint.volumeClaimName`` is mounted."""

SOURCE_DIRECTORY = CHECKPOINT_DIRECTORY
"""Where the checkpoint claim of the job in ``spec.model.fromJob`` is mounted, read-only, instead of an own one; since
protocol 4.
"""

SCRATCH_DIRECTORY = "/tmp"  # noqa: S108 - an emptyDir of the pod's own; the root file system is read-only
TRACE_FILE = "trace.json"
"""Name under the scratch directory of rank 0 that holds the newest step as a Chrome trace; its agent serves it."""

TERMINATION_LOG = "/dev/termination-log"


class Env(StrEnum):
    """Environment variables that the operator sets in every stage pod."""

    RANK = "RANK"
    WORLD_SIZE = "WORLD_SIZE"
    LOCAL_RANK = "LOCAL_RANK"
    MASTER_ADDR = "MASTER_ADDR"
    MASTER_PORT = "MASTER_PORT"
    PIPELINE_STAGE = "PIPELINE_STAGE"
    PIPELINE_STAGES = "PIPELINE_STAGES"
    PIPELINE_INDEX = "PIPELINE_INDEX"
    PIPELINE_COUNT = "PIPELINE_COUNT"
    THREADS = "OMP_NUM_THREADS"
    JOB = "PIPELINEJOB_NAME"
    JOB_UID = "PIPELINEJOB_UID"
    ATTEMPT = "PIPELINEJOB_ATTEMPT"
    POD_IP = "PIPELINEJOB_POD_IP"
    NODE = "PIPELINEJOB_NODE"
    SPARE = "PIPELINEJOB_SPARE"
    """Number of a spare pod, which has no stage until its membership says Run; since protocol 4."""


class ExitCode(IntEnum):
    """Exit codes of an agent. Anything that is not listed here is the worker process's own failure."""

    SUCCEEDED = 0
    CONFIGURATION = 64
    """Trying again cannot help: the model, the data or the volume does not fit the job. Final."""
    BUDGET_SPENT = 70
    """The worker has ended too often for ``spec.recovery``, or always at the same step; since protocol 4. Final."""
    PEER_LOST = 75
    """This stage is well; a link to another stage broke. Never the first cause of a failure."""
    DRAINED = 79
    """Asked to leave; all stages stopped at the same step boundary, checkpointed where a volume is set."""

    @property
    def final(self) -> bool:
        """Whether a restart is pointless."""
        return self in (ExitCode.SUCCEEDED, ExitCode.CONFIGURATION, ExitCode.BUDGET_SPENT)
