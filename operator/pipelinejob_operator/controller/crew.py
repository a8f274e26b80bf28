"""The crew: a pod for every place of the group, and for every place that is to join it. Pure."""

from pipelinejob_operator.api.status import StageStatus
from pipelinejob_operator.build.membership import member
from pipelinejob_operator.build.names import pod_name
from pipelinejob_operator.build.place import Place
from pipelinejob_operator.build.pods import stage_pod
from pipelinejob_operator.controller import gang as gang_plan
from pipelinejob_operator.controller import group as group_plan
from pipelinejob_operator.controller import spares
from pipelinejob_operator.controller.actions import ApplyObject, CreatePod, SetMembership
from pipelinejob_operator.controller.decision import Decision
from pipelinejob_operator.controller.observed import key_of
from pipelinejob_operator.policy import recovery
from pipelinejob_operator.policy.facts import SparePod, StagePod, parse_time
from pipelinejob_operator.policy.reasons import ConditionType, Reason


def fill(d: Decision) -> None:
    """Make the pods that are missing, or let spares take their places; open the gates of those that are there.

    Pods of a first gang are admitted all together, as everywhere; a single one needs nobody to wait for.
    """
    first = d.job.status.group is None
    if d.seen.network_due or (first and not d.gang.complete(d.gang.shape.size)):
        d.actions += [ApplyObject(manifest) for manifest in gang_plan.standing(d.job, d.seen, d.installation)]
    missing = [place for place in d.gang.shape.places() if place.rank not in d.gang.current]
    joining = [place for place, pod in d.gang.joining.items() if pod is None]
    if missing:
        _make_room(d)
    elif all(pod.scheduled for pod in d.gang.current.values()):
        missing = joining
    ready = spares.ready(d)
    for place in missing:
        _occupy(d, place, ready)
    if first and missing:
        return
    members = [pod for pod in d.gang.current.values() if _gated(pod)]
    # Who is to join waits behind its gate while a stage lacks its node: what room there is belongs to that.
    if gated := members or [pod for pod in d.gang.joining.values() if pod and _gated(pod)]:
        d.actions += gang_plan.gates(d.job, gated, d.seen)


def _gated(pod: StagePod) -> bool:
    return pod.gate is not None and not pod.terminating


def _make_room(d: Decision) -> None:
    """Take pods away that only wait to join: what room comes belongs to the stages that the others wait for."""
    d.delete(pod for pod in d.gang.joining.values() if pod and not pod.scheduled and pod.gate is None)


def _occupy(d: Decision, place: Place, ready: list[SparePod]) -> None:
    stage = _stage(d, place)
    since = parse_time(stage.replacement_time)
    if since is not None and d.now < (due := since + recovery.delay(stage.quick_replacements)):
        d.alarms.append(due)
        return
    number = _number(d, place, stage)
    if ready:
        spare = ready.pop(0)
        d.actions.append(SetMembership(spare, _first_words(d, place), group_plan.as_stage(place, number)))
        return
    if d.seen.refusal:
        d.alarms.append(d.seen.refusal.retry_at)
        return
    pod = stage_pod(
        d.job,
        place,
        d.installation,
        share_host=gang_plan.share_host(d.seen.claim, d.job.shape.size),
        delegate=gang_plan.delegate(d.job, d.seen, d.installation),
        replacement=number,
    )
    d.actions.append(CreatePod(pod))


def _first_words(d: Decision, place: Place) -> str:
    """What a spare is told as it takes a place: to run, unless it must wait for the group or for its predecessor."""
    group = d.job.status.group
    if group is None or place in d.gang.joining or place.rank == 0 or group_plan.predecessor_leaves(d, place):
        return ""
    return member(d.job.status.epoch, group, place, {}).to_json()


def _stage(d: Decision, place: Place) -> StageStatus:
    known = {(item.pipeline, item.index): item for item in d.job.status.stages}
    return known.get(key_of(place), StageStatus(index=place.stage, pipeline=place.pipeline))


def _number(d: Decision, place: Place, stage: StageStatus) -> int:
    """Number of the place's next pod: the one that is wanted, or the next whose name is free."""
    names = {pod.name for pod in d.seen.pods}
    number = stage.replacement
    while pod_name(d.job.name, place, d.job.status.attempt, number) in names:
        number += 1
    return number


def observe_placement(d: Decision) -> None:
    """Say whether every stage has a node."""
    if d.seen.refusal and not d.gang.complete(d.gang.shape.size):
        d.say(ConditionType.PLACED, d.seen.refusal.reason, d.seen.refusal.message)
        return
    gang_plan.observe_placement(d)


def observe(d: Decision) -> None:
    """Say how the stages are."""
    observe_placement(d)
    size = d.gang.shape.size
    told = gang_plan.running(d.gang, size)
    if d.job.status.group is None:
        d.draft.condition(ConditionType.RUNNING, *told)
    elif told[0] == "True":
        d.draft.condition(ConditionType.RUNNING, *_changing(d, told))
    elif told[1] in (Reason.STARTING, Reason.NOT_PLACED) and _has_run(d):
        d.say(ConditionType.RUNNING, Reason.RECOVERING, _recovering(d, told[2]))
    else:
        d.draft.condition(ConditionType.RUNNING, *told)


def _has_run(d: Decision) -> bool:
    """Whether the job makes its way from a failure or through a change, and not to its first step."""
    return d.job.status.progress.step > 0 or d.job.status.restarts > 0


def _recovering(d: Decision, words: str) -> str:
    waits = [str(pod.place) for pod in d.gang.current.values() if not pod.ready and not pod.succeeded]
    lack = [str(place) for place in d.gang.shape.places() if place.rank not in d.gang.current]
    names = ", ".join([*lack, *waits][:4])
    return f"{words}; the group goes on when {names} can" if names else words


def _changing(d: Decision, told: gang_plan.Told) -> gang_plan.Told:
    """Say what the running group is on its way to."""
    wanted, shape = d.job.shape, d.gang.shape
    if wanted != shape:
        waits = [pod for pod in d.gang.joining.values() if pod and _why_waits(d, pod)]
        if waits and d.job.spec.elasticity.min_stages is not None:
            return "True", Reason.FEWER_STAGES, _fewer(d, waits[0])
        return "True", Reason.RESCALING, f"{shape} train on while pods for {wanted} come up"
    if d.gang.leavers:
        names = ", ".join(sorted(d.gang.leavers)[:4])
        return "True", Reason.RESCALING, f"{shape} train; what {names} held is being handed over"
    return told


def _fewer(d: Decision, pod: StagePod) -> str:
    return f"{d.gang.shape} run where {d.job.shape} are wanted; {pod.place} finds no node: {_why_waits(d, pod)}"


def _why_waits(d: Decision, pod: StagePod) -> str:
    """Why a pod has no node, in the words of kube-scheduler or of the planner; empty where it may have one soon."""
    return d.seen.unplaced.message if d.seen.unplaced and _gated(pod) else pod.unschedulable
