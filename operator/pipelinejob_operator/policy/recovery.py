"""Recovery: the ladder. What ends in a job of agents that recover by themselves, and the least that answers it.

=============  ==========================================================  ===============================
rung           who answers                                                 what the operator does
=============  ==========================================================  ===============================
process        the agents, among themselves                                counts it, tells it
container      the kubelet starts it again in place                        counts it, tells it
pod            a new pod, or a spare, for this stage alone                 raises its ``replacement``
fewer stages   the others, if ``elasticity`` allows (``policy/shapes.py``)  a new group
fail           nobody                                                      the job fails
=============  ==========================================================  ===============================

Whether the state comes from memory or from the checkpoint is for the agents to find out: the pods are the same.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import IntEnum

from pipelinejob_operator.api.recovery import Rule
from pipelinejob_operator.api.status import StageStatus
from pipelinejob_operator.build.place import Place
from pipelinejob_operator.policy import rules
from pipelinejob_operator.policy.facts import Failure, Pod, StagePod, parse_time
from pipelinejob_operator.policy.failure import OVERDUE
from pipelinejob_operator.policy.reasons import Reason
from pipelinejob_worker.protocol import ExitCode, FailureRecord

CONTAINER_REASONS = frozenset({"ContainerLost", "OOMKilled"})
"""What an agent writes of the agent before it in the same pod: the kubelet has counted that already."""

FINAL: dict[int, Reason] = {
    ExitCode.CONFIGURATION: Reason.INVALID_CONFIGURATION,
    ExitCode.BUDGET_SPENT: Reason.RESTART_BUDGET_SPENT,
}
"""Exit codes with which an agent says that another try cannot help."""

NODE_LOST, POD_LOST, DELETED = "NodeLost", "PodLost", "Deleted"
_AT_ONCE = "the pod is gone; somebody deleted it at once"

QUICK = timedelta(seconds=60)
"""New pods of one stage that follow each other within this time, and the back-off itself, without a step in between
wait ever longer."""
FIRST_DELAY_SECONDS = 1
LONGEST_DELAY_SECONDS = 60


class Rung(IntEnum):
    """Who answers a failure, from the least to the last."""

    PROCESS = 1
    CONTAINER = 2
    POD = 3
    FAIL = 4


@dataclass(frozen=True)
class Setback:
    """One failure of one stage, and what answers it."""

    rung: Rung
    failure: Failure
    at: datetime
    counts: bool = True
    """Whether it is a failure, and not a pod that was asked to leave."""
    fence: bool = False
    """Whether the old pod may still live unseen, so that its epoch must end."""
    recorded: bool = False
    """Whether an agent told it, so that its time says whether it has been counted."""
    final: Reason = Reason.RECOVERY_RULE
    """With ``FAIL``: what the job failed of."""


@dataclass(frozen=True)
class Look:
    """What the pods alone do not say."""

    now: datetime
    unready_nodes: frozenset[str] = frozenset()
    """Nodes known not to answer."""
    node_conditions: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Types of the conditions that are True, by node."""
    group_runs: bool = False
    """Whether an agent has just said that the whole group makes steps, so that no stage of it is lost."""
    rules: Sequence[Rule] = ()


def setback(place: Place, pod: StagePod | None, before: StageStatus, look: Look) -> Setback | None:
    """Tell what is wrong with a stage's pod, None while nothing is.

    ``before`` is what the status says of the stage: a pod that it names and that is not there has been lost; where it
    names none, the pod is still to be made.
    """
    found = _gone(place, before, look) if pod is None else _of_pod(pod, before, look)
    return _by_rules(found, look) if found else None


def _gone(place: Place, before: StageStatus, look: Look) -> Setback | None:
    if not before.pod:
        return None
    return _deleted_at_once(Failure(place, before.node, before.pod, 0, POD_LOST, _AT_ONCE), look)


def _deleted_at_once(lost: Failure, look: Look) -> Setback:
    """Nothing was handed over, and its node may not have heard of it."""
    return Setback(Rung.POD, lost, look.now, fence=True)


def _of_pod(pod: StagePod, before: StageStatus, look: Look) -> Setback | None:
    if pod.over:
        return _ended(pod, look)
    if pod.node in look.unready_nodes and not (look.group_runs and not pod.terminating):
        lost = _told(pod, NODE_LOST, f"node {pod.node} does not answer")
        return Setback(Rung.POD, lost, look.now, fence=True)
    if pod.terminating:
        lost = _told(pod, POD_LOST, _AT_ONCE)
        return _deleted_at_once(lost, look) if pod.without_grace else _asked_to_leave(pod, look)
    if met := rules.about_node(look.rules, pod.node, look.node_conditions):
        rule, kind = met
        failure = _told(pod, kind, f"node {pod.node} has the condition {kind} (rule {rule.name})")
        return Setback(Rung.FAIL if rule.action == "FailJob" else Rung.POD, failure, look.now)
    if pod.container_restarts > before.container_restarts:
        words = "its container ended and was started again in place"
        return Setback(Rung.CONTAINER, _told(pod, "ContainerLost", words), look.now)
    return None


def _ended(pod: StagePod, look: Look) -> Setback | None:
    ended = pod.ended
    if ended is None:  # the kubelet or the node's controller has given the whole pod up
        words = pod.message or f"the pod was given up ({pod.reason or pod.phase})"
        return Setback(Rung.POD, _told(pod, pod.reason or "Failed", words), look.now)
    if ended.exit_code == ExitCode.SUCCEEDED:
        return None
    if ended.exit_code == ExitCode.DRAINED or (pod.terminating and ended.exit_code not in FINAL):
        return _asked_to_leave(pod, look)
    failure = replace(
        _told(pod, ended.reason, ended.message), exit_code=ended.exit_code, step=ended.step, log_tail=ended.log_tail
    )
    if final := FINAL.get(ended.exit_code):
        return Setback(Rung.FAIL, failure, ended.at or look.now, final=final)
    if why := pod.disruption or ("Evicted" if pod.reason == "Evicted" else ""):
        failure = replace(failure, reason=why, message=pod.message or failure.message)
    return Setback(Rung.POD, failure, ended.at or look.now)


def _asked_to_leave(pod: StagePod, look: Look) -> Setback:
    """Somebody wants the pod away: it hands over and leaves, and its successor is made at once."""
    why = pod.disruption or DELETED
    return Setback(Rung.POD, _told(pod, why, f"the pod was asked to leave ({why})"), look.now, counts=False)


def _told(pod: StagePod, reason: str, words: str) -> Failure:
    return Failure(pod.place, pod.node, pod.name, 0, reason or "Error", words)


def of_records(
    records: Sequence[FailureRecord], places: Mapping[int, tuple[Place, str, StageStatus]], look: Look
) -> Iterator[Setback]:
    """Tell the failures of worker processes that the agents have answered and that are not counted yet.

    ``places``: by rank the place, its pod's name, and what the status says of it.
    """
    for record in sorted(records, key=lambda record: record.at):
        if record.rank not in places or record.exit_code in FINAL:
            continue  # what is final nobody answers: the end of the container tells it
        place, pod, before = places[record.rank]
        at = datetime.fromtimestamp(round(record.at, 6), UTC)
        counted = parse_time(before.last_failure_time)
        if counted is not None and at <= counted:
            continue
        failure = Failure(
            place,
            record.node,
            pod,
            record.exit_code,
            record.reason,
            record.message,
            record.step,
            record.log_tail,
        )
        counts = record.reason not in CONTAINER_REASONS
        yield _by_rules(Setback(Rung.PROCESS, failure, at, counts=counts, recorded=True), look)


def _by_rules(found: Setback, look: Look) -> Setback:
    """Let the first matching rule change the answer; nothing changes what is final, or a pod's request to leave."""
    if found.rung is Rung.FAIL or (not found.counts and found.rung is Rung.POD):
        return found
    rule = rules.matching(look.rules, found.failure)
    if rule is None:
        return found
    match rule.action:
        case "Ignore":
            return replace(found, counts=False)
        case "Restart":
            return found
        case "ReplacePod":
            return replace(found, rung=Rung.POD)
        case "FailJob":
            words = f"{found.failure.message} (rule {rule.name} of spec.recovery.rules)"
            return replace(found, rung=Rung.FAIL, failure=replace(found.failure, message=words))


def first(setbacks: Sequence[Setback]) -> Setback:
    """Return the one to tell of: the last rung counts most, then what is a failure, then what came first."""
    return min(setbacks, key=lambda one: (-one.rung, not one.counts, one.at, one.failure.place.rank))


def in_succession(before: StageStatus, step: int, now: datetime) -> int:
    """Count the new pods of a stage that follow each other quickly, the one now asked for included; 0: the first.

    ``step``: the last that the job has finished. One past the pod before shows that this was of use: what ends pods
    that train is bounded by the budget if it is a failure, and is somebody's wish if it is none.
    """
    last = parse_time(before.replacement_time)
    if last is None or step > before.replacement_step or now >= last + QUICK + delay(before.quick_replacements):
        return 0
    return before.quick_replacements + 1


def delay(quick_replacements: int) -> timedelta:
    """Back-off before a new pod: none for the first, then 1, 2, 4 ... 60 seconds."""
    if quick_replacements <= 0:
        return timedelta(0)
    return timedelta(seconds=min(FIRST_DELAY_SECONDS << min(quick_replacements - 1, 16), LONGEST_DELAY_SECONDS))


def still_leaving(pod: Pod, unready_nodes: frozenset[str], now: datetime) -> bool:
    """Whether an older pod of a stage may still hand over, so that its successor must not take the rank yet."""
    if pod.over or not pod.started or pod.node in unready_nodes:
        return False
    return pod.gone_by is None or now < pod.gone_by + OVERDUE
