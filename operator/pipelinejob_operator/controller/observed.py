"""What a plan is made from: one look at a job and everything that belongs to it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from pipelinejob_operator.api.recovery_status import Move
from pipelinejob_operator.build.job import Job
from pipelinejob_operator.build.membership import shape_of
from pipelinejob_operator.build.place import Place, Shape
from pipelinejob_operator.controller.located import Located
from pipelinejob_operator.policy.facts import Claim, SparePod, StagePod
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
    pods: int = 0
    """How many there are, those that are leaving included."""
    problem: str = ""
    """Why pods of it cannot be made, in the words of the API server."""


@dataclass(frozen=True)
class Unplaced:
    """Why a gang has no nodes yet, and when to try again even if nothing happens."""

    reason: Reason
    message: str
    retry_at: datetime
    gains: int
    """The inventory's count when it was decided: the same gang finds no nodes before it has grown."""


@dataclass(frozen=True)
class Observed:
    """One look at a job's surroundings."""

    pods: Sequence[StagePod] = ()
    """All stage pods that this job owns, of any attempt."""
    spares: Sequence[SparePod] = ()
    """Its spare pods, of any attempt."""
    claim: Claim | None = None
    """The checkpoint claim; None also where none is named."""
    claim_missing: bool = False
    unready_nodes: frozenset[str] = frozenset()
    """Nodes known not to answer; empty where the operator may not read nodes."""
    node_conditions: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Types of the conditions that are True, by node; read only where a rule of the job is about them."""
    agent: AgentStatus | None = None
    """What an agent of the present attempt said last."""
    pipelines: Sequence[AgentStatus] = ()
    """The same of each pipeline of a Serve job that has said something."""
    source_problem: Verdict | None = None
    """Why the job of ``spec.model.fromJob`` cannot be served; None also where none is named."""
    fronts: Fronts | None = None
    """The fronts of a Serve job, once their Deployment exists."""
    agent_fresh: bool = False
    """Whether it said so a moment ago."""
    released: frozenset[str] = frozenset()
    """Addresses of leaving pods whose agents have given all they hold."""
    refusal: Refusal | None = None
    """A refusal still in force: creation waits until its ``retry_at``."""
    scheduler_served: bool = False
    """Whether the API of the scheduler that the job is delegated to is served."""
    plans: bool = False
    """Whether nodes and all pods are known, so that the operator can plan."""
    unplaced: Unplaced | None = None
    """Why the gang has no nodes, while that holds."""
    room_unknown: bool = False
    """Whether it is to be asked, before the gang's first pod is made, if the nodes could hold it."""
    hopeless: Unplaced | None = None
    """Why the nodes could not, even if nothing else ran."""
    unfit_levels: str = ""
    """What is wrong with the job's topology levels on this cluster; empty where nothing is."""
    located: Located | None = None
    """How near the stages are, once all have a node."""
    network_due: bool = True
    """Whether Service and NetworkPolicy have not been compared for a while."""


Key = tuple[int, int]
"""Pipeline and stage: a place, whatever shape it is in."""


@dataclass(frozen=True)
class Gang:
    """The pods of the present attempt by rank, and those of others.

    Where the agents recover by themselves, the pod of a place is the newest that is not older than the status wants,
    and the shape is that of the group which trains, whatever the spec asks for meanwhile.
    """

    shape: Shape
    current: dict[int, StagePod] = field(default_factory=dict)
    others: tuple[StagePod, ...] = ()
    """Those that nobody needs any more."""
    recovers: bool = False
    joining: dict[Place, StagePod | None] = field(default_factory=dict)
    """Places that the spec asks for and the group does not have yet, with their pods."""
    leavers: dict[str, StagePod] = field(default_factory=dict)
    """By name those that still give what they hold."""

    @classmethod
    def of(cls, job: Job, seen: Observed) -> "Gang":
        """Sort the pods."""
        attempt = job.status.attempt
        mine = [pod for pod in seen.pods if pod.attempt == attempt]
        if not job.recovers or any(pod.replacement is None for pod in mine):
            newest = {pod.place.rank: pod for pod in sorted(mine, key=lambda pod: pod.replacement or 0)}
            return cls(job.shape, newest, tuple(pod for pod in seen.pods if newest.get(pod.place.rank) is not pod))
        return cls._recovering(job, seen, mine)

    @classmethod
    def _recovering(cls, job: Job, seen: Observed, mine: list[StagePod]) -> "Gang":
        group = job.status.group
        shape = shape_of(group) if group else job.shape
        wanted = {(item.pipeline, item.index): item.replacement for item in job.status.stages}
        moves = {move.pod: move for move in group.moves} if group else {}
        newest: dict[Key, StagePod] = {}
        for pod in sorted((_moved(pod, moves.get(pod.name)) for pod in mine), key=lambda pod: pod.replacement or 0):
            key = key_of(pod.place)
            if (pod.replacement or 0) >= wanted.get(key, 0):
                newest[key] = pod
        current = {place.rank: held for place in shape.places() if (held := _at(newest.get(key_of(place)), place))}
        has = {key_of(place) for place in shape.places()}
        joining = {
            place: _at(newest.get(key_of(place)), place) for place in job.shape.places() if key_of(place) not in has
        }
        giving = set(group.leavers) - set(group.released) if group else set()
        leavers = {pod.name: pod for pod in mine if pod.name in giving}
        kept = {pod.name for pod in (*current.values(), *joining.values(), *leavers.values()) if pod}
        others = tuple(pod for pod in seen.pods if pod.attempt != job.status.attempt or pod.name not in kept)
        return cls(shape, current, others, recovers=True, joining=joining, leavers=leavers)

    def complete(self, size: int) -> bool:
        """Whether every rank of a gang of ``size`` pods has its pod."""
        return all(rank in self.current for rank in range(size))


def key_of(place: Place) -> Key:
    """Pipeline and stage of a place."""
    return place.pipeline, place.stage


def _moved(pod: StagePod, move: Move | None) -> StagePod:
    """Give a pod the place that it was moved to, also before its labels say so."""
    if move is None:
        return pod
    return replace(pod, place=Place(move.stage, move.pipeline, pod.place.shape), replacement=move.replacement)


def _at(pod: StagePod | None, place: Place) -> StagePod | None:
    """Return the pod at the same place of another shape."""
    return replace(pod, place=place) if pod else None
