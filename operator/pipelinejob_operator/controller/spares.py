"""Spares: pods that wait, with all imported, to take over a stage. Pure."""

from datetime import timedelta

from pipelinejob_operator.build.names import spare_name
from pipelinejob_operator.build.pods import spare_pod
from pipelinejob_operator.controller import gang as gang_plan
from pipelinejob_operator.controller.actions import CreatePod
from pipelinejob_operator.controller.decision import Decision
from pipelinejob_operator.policy.facts import SparePod

FAILED_WAIT = timedelta(seconds=30)
"""How long a spare that failed stands in the way of the next."""


def _usable(d: Decision, spare: SparePod) -> bool:
    return (
        spare.attempt == d.job.status.attempt
        and spare.started
        and not spare.terminating
        and not spare.over
        and spare.node not in d.seen.unready_nodes
    )


def ready(d: Decision) -> list[SparePod]:
    """Spares that can take over a stage, the warm ones first."""
    usable = [spare for spare in d.seen.spares if _usable(d, spare)]
    return sorted(usable, key=lambda spare: (not spare.ready, spare.index, spare.name))


def tend(d: Decision) -> None:
    """Keep as many spares as the spec asks for, once every stage has its node: they must not take a stage's room."""
    wanted = d.job.spec.recovery.spares
    present = [spare for spare in d.seen.spares if spare.attempt == d.job.status.attempt]
    kept = {spare.index: spare for spare in sorted(present, key=lambda spare: spare.name) if spare.index < wanted}
    d.draft.set(ready_spares=sum(spare.ready and not spare.terminating for spare in kept.values()))
    failed = [spare for spare in kept.values() if spare.over]
    for spare in failed:
        due = ((spare.ended and spare.ended.at) or d.now) + FAILED_WAIT
        if d.now < due:
            d.alarms.append(due)
        else:
            d.delete([spare])
    d.delete(spare for spare in d.seen.spares if kept.get(spare.index) is not spare)
    size = d.gang.shape.size
    if d.seen.refusal or not d.gang.complete(size) or not all(pod.scheduled for pod in d.gang.current.values()):
        return
    names = {pod.name for pod in (*d.seen.pods, *d.seen.spares)}
    share_host = gang_plan.share_host(d.seen.claim, d.job.shape.size)
    for index in range(wanted):
        if index not in kept or kept[index].terminating:
            number = next(n for n in range(len(names) + 1) if spare_name(d.job.name, index, n) not in names)
            d.actions.append(CreatePod(spare_pod(d.job, index, number, d.installation, share_host=share_host)))


def release(d: Decision) -> None:
    """Let all spares go: the job does not run."""
    d.delete(d.seen.spares)
    d.draft.set(ready_spares=0)
