"""What a plan is made from: one look at a job and everything that belongs to it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from pipelinejob_operator.build.job import Job
from pipelinejob_operator.controller.located import Located
from pipelinejob_operator.policy.facts import Claim, StagePod
from pipelinejob_operator.policy.reasons import Reason, Verdict
from pipelinejob_worker.protocol import AgentStatus


@dataclass(frozen=True)
class Refusal:
    """The API server's no to one of the job's objects, and when to ask again."""

    reason: Reason
    message: str
    generation: int
    retry_at: datetime


@dataclass(frozen=True)
class Fronts:
    """The fronts' Deployment."""

    wanted: int = 0
    """Replicas that it was last asked for."""
    ready: int = 0
    problem: str = ""
    """Why pods of it cannot be made, in the words of the API server."""


@dataclass(frozen=True)
class Unplaced:
    """Why a gang whose pods all exist has no nodes yet, and when to try again even if nothing happens."""

    reason: Reason
    message: str
    retry_at: datetime
    gains: int
    """The inventory's count when it was decided: the same gang finds no nodes before it has grown."""


@dataclass(frozen=True)
class Observed:
    """One look at a job's surroundings."""

    pods: Sequence[StagePod] = ()
    """All pods that this job owns, of any attempt."""
    claim: Claim | None = None
    """The checkpoint claim; None also where none is named."""
    claim_missing: bool = False
    unready_nodes: frozenset[str] = frozenset()
    """Nodes known not to answer; empty where the operator may not read nodes."""
    agent: AgentStatus | None = None
    """What an agent of the present attempt said last."""
    pipelines: Sequence[AgentStatus] = ()
    """The same of each pipeline of a Serve job that has said something."""
    source_problem: Verdict | None = None
    """Why the job of ``spec.model.fromJob`` cannot be served; None also where none is named."""
    fronts: Fronts | None = None
    """The fronts of a Serve job, once their Deployment exists."""
    refusal: Refusal | None = None
    """A refusal still in force: creation waits until its ``retry_at``."""
    scheduler_served: bool = False
    """Whether the API of the scheduler that the job is delegated to is served."""
    plans: bool = False
    """Whether nodes and all pods are known, so that the operator can plan."""
    unplaced: Unplaced | None = None
    """Why the gang has no nodes, while that holds."""
    unfit_levels: str = ""
    """What is wrong with the job's topology levels on this cluster; empty where nothing is."""
    located: Located | None = None
    """How near the stages are, once all have a node."""
    network_due: bool = True
    """Whether Service and NetworkPolicy have not been compared for a while."""


@dataclass(frozen=True)
class Gang:
    """The pods of the present attempt by rank, and those of others."""

    current: dict[int, StagePod] = field(default_factory=dict)
    others: tuple[StagePod, ...] = ()

    @classmethod
    def of(cls, job: Job, seen: Observed) -> "Gang":
        """Sort the pods by attempt."""
        attempt = job.status.attempt
        return cls(
            {pod.place.rank: pod for pod in seen.pods if pod.attempt == attempt},
            tuple(pod for pod in seen.pods if pod.attempt != attempt),
        )

    def complete(self, size: int) -> bool:
        """Whether every rank of a gang of ``size`` pods has its pod."""
        return all(rank in self.current for rank in range(size))
