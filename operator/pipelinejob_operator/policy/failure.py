"""Failure: which stage failed first, and what follows from it.

A pipeline falls like dominoes: one stage fails and every other one ends within seconds because of it. Their
exit codes tell cause from victim (``ExitCode.PEER_LOST`` is never a cause); among causes, the earliest
counts.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum, auto

from pipelinejob_operator.build.names import pod_name
from pipelinejob_operator.build.place import Place, Shape
from pipelinejob_operator.policy.facts import Failure, StagePod
from pipelinejob_worker.protocol import ExitCode

CULPRIT_WAIT = timedelta(seconds=10)
"""How long stages that only lost a peer wait for the peer's own end to be reported."""

OVERDUE = timedelta(seconds=10)
"""A pod that is still there so long after its grace period has a kubelet that does not answer."""


class Answer(Enum):
    """What follows from a finding."""

    FAIL = auto()
    """Another try cannot help: the job fails."""
    RESTART = auto()
    """Replace the gang; counts against the budget."""
    REPLACE = auto()
    """Replace the gang; nobody failed, so it does not count."""
    WAIT = auto()
    """The cause has not shown itself yet."""


@dataclass(frozen=True)
class Finding:
    """The first failure of a gang."""

    answer: Answer
    failure: Failure
    recheck_at: datetime | None = None
    draining: bool = False


@dataclass(frozen=True)
class _Cause:
    answer: Answer
    at: datetime
    failure: Failure


@dataclass(frozen=True)
class Look:
    """What the pods alone do not say."""

    job: str
    shape: Shape
    attempt: int
    protocol: bool
    """Whether the pods run our agent, so that exit codes mean what ``ExitCode`` says."""
    unready_nodes: frozenset[str]
    """Nodes known not to answer."""
    now: datetime


def first(gang: Mapping[int, StagePod], look: Look) -> Finding | None:
    """Find what failed first in a gang (rank to pod) that was complete once; None while nothing is wrong."""
    causes = [cause for place in look.shape.places() if (cause := _cause(place, gang.get(place.rank), look))]
    if final := [cause for cause in causes if cause.answer is Answer.FAIL]:
        return Finding(Answer.FAIL, final[0].failure)
    if causes:
        earliest = min(causes, key=lambda cause: (cause.at, cause.failure.place.rank))
        return Finding(earliest.answer, earliest.failure)
    pods = [gang[rank] for rank in sorted(gang)]
    leaving = [pod for pod in pods if pod.gone_by and pod.ended is None]
    if leaving:
        last = max(pod.gone_by for pod in leaving if pod.gone_by)
        return Finding(Answer.WAIT, _lost(leaving[0], "Deleted"), last + OVERDUE, draining=True)
    victims = [pod for pod in pods if _victim(pod, look.protocol)]
    return _without_cause(victims, pods, look) if victims else None


def _cause(place: Place, pod: StagePod | None, look: Look) -> _Cause | None:
    """What a stage's own pod says: a cause, or None when it is well, a victim, or still on its way out."""
    if pod is None:
        name = pod_name(look.job, place, look.attempt)
        gone = Failure(place, "", name, 0, "PodLost", "the pod is gone; somebody deleted it")
        return _Cause(Answer.RESTART, look.now, gone)
    if pod.ended:
        return _ended(pod, look)
    if pod.phase == "Failed":
        return _Cause(Answer.RESTART, look.now, _lost(pod, pod.reason or "Failed"))
    if pod.gone_by and (pod.node in look.unready_nodes or look.now >= pod.gone_by + OVERDUE):
        return _Cause(Answer.RESTART, look.now, _lost(pod, "NodeLost"))
    return None


def _ended(pod: StagePod, look: Look) -> _Cause | None:
    ended = pod.ended
    assert ended is not None
    if ended.exit_code == ExitCode.SUCCEEDED or _victim(pod, look.protocol):
        return None
    at = ended.at or look.now
    told = Failure(
        pod.place,
        pod.node,
        pod.name,
        ended.exit_code,
        ended.reason,
        ended.message,
        ended.step,
        ended.log_tail,
    )
    if look.protocol and ended.exit_code == ExitCode.CONFIGURATION:
        return _Cause(Answer.FAIL, at, told)
    if look.protocol and ended.exit_code == ExitCode.DRAINED:
        return _Cause(Answer.REPLACE, at, told)
    if pod.terminating or pod.disruption or pod.reason == "Evicted":
        return _Cause(Answer.RESTART, at, _lost(pod, pod.disruption or pod.reason or "Deleted"))
    return _Cause(Answer.RESTART, at, told)


def _victim(pod: StagePod, protocol: bool) -> bool:
    return protocol and pod.ended is not None and pod.ended.exit_code == ExitCode.PEER_LOST and not pod.terminating


def _lost(pod: StagePod, why: str) -> Failure:
    code = pod.ended.exit_code if pod.ended else 0
    step = pod.ended.step if pod.ended else 0
    words = pod.message or {
        "NodeLost": f"node {pod.node} does not answer",
        "Deleted": "somebody deleted the pod",
    }.get(pod.disruption or why, f"the pod was taken away ({pod.disruption or why})")
    return Failure(pod.place, pod.node, pod.name, code, "PodLost", words, step)


def _without_cause(victims: Sequence[StagePod], gang: Sequence[StagePod], look: Look) -> Finding:
    """Stages lost a peer and none has said why: look at the nodes, then wait, then blame the silent one."""
    for pod in gang:
        if pod.ended is None and pod.node in look.unready_nodes:
            return Finding(Answer.RESTART, _lost(pod, "NodeLost"))
    since = min(_times(victims), default=look.now)
    early = min(victims, key=lambda pod: ((pod.ended and pod.ended.at) or look.now, pod.place.rank))
    silent = next((pod for pod in gang if pod.ended is None), None)
    if silent:
        message = "its peers lost it, and it neither answers nor ends"
        failure = Failure(silent.place, silent.node, silent.name, 0, "PeerLost", message)
    else:
        assert early.ended is not None
        failure = Failure(
            early.place,
            early.node,
            early.name,
            early.ended.exit_code,
            "PeerLost",
            "every stage lost a peer and none failed by itself: the network between the nodes broke",
            early.ended.step,
            early.ended.log_tail,
        )
    if look.now < since + CULPRIT_WAIT:
        return Finding(Answer.WAIT, failure, since + CULPRIT_WAIT)
    return Finding(Answer.RESTART, failure)


def _times(pods: Sequence[StagePod]) -> Iterator[datetime]:
    return (pod.ended.at for pod in pods if pod.ended and pod.ended.at)
