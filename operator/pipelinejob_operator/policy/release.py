"""Release: when pods whose gates were opened must be taken back, because they will not all get their nodes.

A gang that has not begun is released as a whole: half a gang holds what another job could use. Where the others run
already, only the pod that found no place is.
"""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta

from pipelinejob_operator.build.opening import PROVISION
from pipelinejob_operator.policy.facts import StagePod

UNSCHEDULABLE_PATIENCE = timedelta(seconds=10)
"""How long kube-scheduler may refuse a pod on its planned node: something else may be about to leave it."""

PREEMPTION_PATIENCE = timedelta(seconds=120)
"""How long pods that kube-scheduler preempts for a stage may take to leave."""

KUBELET_REFUSED = "Pod was rejected"
"""How the message of a pod begins that a kubelet did not admit: OutOfcpu, NodeAffinity, UnexpectedAdmissionError."""

PREEMPTED = "PreemptionByScheduler"


@dataclass(frozen=True)
class Release:
    """Pods to take back, or when to look again."""

    pods: tuple[StagePod, ...] = ()
    why: str = ""
    """In one line: which stage, on which node, in whose words."""
    avoid: str = ""
    """The node to be left out for a while; empty where none is to blame."""
    look_again_at: datetime | None = None


def judge(gang: Collection[StagePod], provision_timeout: timedelta, now: datetime) -> Release:
    """Say what is to be taken back of a complete gang that has no failure."""
    alarms: list[datetime] = []
    for pod in sorted(gang, key=lambda pod: pod.place.rank):
        if pod.terminating and pod.disruption != PREEMPTED:
            continue
        if pod.phase == "Failed" and pod.ended is None and pod.message.startswith(KUBELET_REFUSED):
            return _release(gang, pod, f"the kubelet of {pod.node} refused {pod.place}: {pod.reason}: {pod.message}")
        if pod.disruption == PREEMPTED and not pod.membership:
            return _release(gang, pod, f"{pod.place} was preempted on {pod.node} before it began")
        if pod.scheduled or pod.opened is None:
            continue
        if pod.opened.why == PROVISION:
            due = pod.opened.at + provision_timeout
            if now >= due:
                return _release(
                    gang, pod, f"{pod.place} found no node within {provision_timeout.total_seconds():.0f} s"
                )
            alarms.append(due)
        elif pod.opened.node and pod.unschedulable:
            due = pod.opened.at + (PREEMPTION_PATIENCE if pod.nominated else UNSCHEDULABLE_PATIENCE)
            if now >= due:
                words = f"kube-scheduler refuses {pod.place} on {pod.opened.node}: {pod.unschedulable}"
                return _release(gang, pod, words)
            alarms.append(due)
    return Release(look_again_at=min(alarms, default=None))


def _release(gang: Collection[StagePod], pod: StagePod, why: str) -> Release:
    begun = any(other.membership for other in gang)
    node = pod.node or (pod.opened.node if pod.opened else "")
    return Release((pod,) if begun else tuple(gang), why, node)
