"""The group: the stages that train together in one epoch, and what each pod is told of it. Pure.

A new epoch is written into the status, with all that defines it, before any pod is told; then each pod is brought to it
whose annotation says something else.
"""

from datetime import datetime, timedelta

from pipelinejob_operator.api.recovery_status import GroupStatus, Move
from pipelinejob_operator.build import membership
from pipelinejob_operator.build.names import (
    PIPELINE_LABEL,
    PIPELINES_LABEL,
    REPLACEMENT_LABEL,
    SPARE_LABEL,
    STAGE_LABEL,
    STAGES_LABEL,
)
from pipelinejob_operator.build.place import Place, Shape
from pipelinejob_operator.controller.actions import SetMembership
from pipelinejob_operator.controller.decision import Decision
from pipelinejob_operator.controller.observed import key_of
from pipelinejob_operator.controller.status import rfc3339
from pipelinejob_operator.policy import recovery, shapes
from pipelinejob_operator.policy.facts import StagePod
from pipelinejob_operator.policy.failure import OVERDUE
from pipelinejob_worker.protocol import ExitCode, Membership

ENDED_WELL = (ExitCode.SUCCEEDED, ExitCode.DRAINED)


def labels(place: Place, replacement: int) -> dict[str, str | None]:
    """Labels that give a pod its place."""
    return {
        STAGE_LABEL: str(place.stage),
        STAGES_LABEL: str(place.shape.stages),
        PIPELINE_LABEL: str(place.pipeline),
        PIPELINES_LABEL: str(place.shape.pipelines),
        REPLACEMENT_LABEL: str(replacement),
    }


def as_stage(place: Place, replacement: int) -> dict[str, str | None]:
    """Labels that make a spare a stage."""
    return labels(place, replacement) | {SPARE_LABEL: None}


def alive(pod: StagePod | None) -> bool:
    """Whether a pod can take part in a new group."""
    return pod is not None and not pod.terminating and not pod.over


def change(d: Decision) -> bool:
    """Write the group of the next epoch, if another one than the present is wanted and possible."""
    group = d.job.status.group
    wanted = _released(d, group) if group else None
    if wanted is not None:  # the epoch stays: nobody need hear of it
        d.draft.set(group=wanted)
        return True
    wanted = _joined(d, group) or _shrunk(d, group) or (_kept(d, group) if group else None)
    if wanted is None:
        return False
    _write(d, wanted)
    return True


def fence(d: Decision) -> None:
    """End the present epoch: a pod of it may still live unseen, and must find itself refused."""
    if group := d.job.status.group:
        _write(d, group)


def stop(d: Decision) -> None:
    """Tell the stages to stop together, with a checkpoint."""
    group = d.job.status.group
    assert group is not None
    _write(d, group.model_copy(update={"stopping_since": rfc3339(d.now)}))


def tell(d: Decision) -> None:
    """Bring every pod's membership in line with the group."""
    group = d.job.status.group
    if group is None:
        return
    epoch, gang = d.job.status.epoch, d.gang
    addresses = {rank: pod.address for rank, pod in gang.current.items()}
    for rank, pod in sorted(gang.current.items()):
        if rank == 0 and pod.address != group.master_address:
            continue  # it comes with an epoch of its own
        if not predecessor_leaves(d, pod.place):
            _say(d, pod, membership.member(epoch, group, pod.place, addresses))
    for place, joiner in gang.joining.items():
        if joiner and joiner.name not in gang.leavers:
            _say(d, joiner, membership.standby(epoch, group, place))
    for index, name in enumerate(group.leavers):
        if name in gang.leavers:
            _say(d, gang.leavers[name], membership.leaver(epoch, group, index))


def _say(d: Decision, pod: StagePod, wanted: Membership) -> None:
    """Write a membership, with the labels of the pod's place, where the pod shows another one."""
    if not pod.over and not membership.says(pod.membership, wanted):
        d.actions.append(SetMembership(pod, wanted.to_json(), labels(pod.place, pod.replacement or 0)))


def predecessor_leaves(d: Decision, place: Place) -> bool:
    """Whether an older pod of the same place may still hand over."""
    older = [pod for pod in d.gang.others if pod.attempt == d.job.status.attempt and key_of(pod.place) == key_of(place)]
    leaving = [pod for pod in older if recovery.still_leaving(pod, d.seen.unready_nodes, d.now)]
    d.alarms += [pod.gone_by + OVERDUE for pod in leaving if pod.gone_by]
    return bool(leaving)


def _write(d: Decision, group: GroupStatus) -> None:
    """Begin a new epoch, above all that the status and any pod have seen.

    Who has given all that was needed is not in it: the others would wait for a pod that is gone.
    """
    giving = [name for name in group.leavers if name not in group.released]
    group = group.model_copy(update={"leavers": giving, "released": []})
    seen = [told.epoch for pod in d.seen.pods if (told := membership.current(pod.membership))]
    epoch = max(d.job.status.epoch, d.job.status.attempt, *seen, 0) + 1
    d.draft.set(epoch=epoch, group=group)
    d.irreversible = True


def _joined(d: Decision, group: GroupStatus | None) -> GroupStatus | None:
    """Return the group in the shape that the spec asks for, once all its pods are there to take part."""
    gang, wanted = d.gang, d.job.shape
    if group is None:
        pods = [gang.current.get(rank) for rank in range(wanted.size)]
        if not all(pod is not None and alive(pod) and pod.address for pod in pods):
            return None
        return _group(d, wanted, gang.current[0].address, [])
    if gang.shape == wanted:
        return None
    present = {key_of(pod.place): pod for pod in gang.current.values()}
    places = {key_of(place) for place in wanted.places()}
    stay = [present.get(key) for key in places if key not in {key_of(place) for place in gang.joining}]
    if not all(alive(pod) for pod in stay) or not all(_warm(d, pod) for pod in gang.joining.values()):
        return None
    leavers = [pod.name for rank, pod in sorted(gang.current.items()) if key_of(pod.place) not in places and alive(pod)]
    return _group(d, wanted, gang.current[0].address, [*_still_giving(d, wanted), *leavers])


def _warm(d: Decision, pod: StagePod | None) -> bool:
    """Whether a new pod could join at once, so that nobody has to wait for its imports."""
    return pod is not None and alive(pod) and (pod.ready or pod.name in d.gang.leavers)


def _still_giving(d: Decision, wanted: Shape) -> list[str]:
    """Pods that leave already, and not for a place in ``wanted``."""
    back = {pod.name for pod in d.gang.joining.values() if pod}
    return [name for name, pod in d.gang.leavers.items() if alive(pod) and name not in back]


def _shrunk(d: Decision, group: GroupStatus | None) -> GroupStatus | None:
    """Return a group of fewer stages, if a stage has found no node for long and elasticity allows it."""
    gang, spec = d.gang, d.job.spec
    if spec.elasticity.min_stages is None:
        return None
    lacking = [place for place in gang.shape.places() if not _placed(gang.current.get(place.rank))]
    since = [time for place in lacking if (time := _lacking_since(d, place))]
    if not since:
        return None
    due = min(since) + elastic_patience(d)
    if d.now < due:
        d.alarms.append(due)
        return None
    pods = [pod for _, pod in sorted(gang.current.items()) if _placed(pod) and pod.address]
    known = shapes.known_layers([item.layers for item in d.job.status.stages])
    shape = shapes.fewer(spec, gang.shape, len(pods), known)
    return _seated(d, group, shape, pods) if shape else None


def elastic_patience(d: Decision) -> timedelta:
    """How long a stage may lack a node."""
    return timedelta(seconds=d.job.spec.elasticity.shrink_after_seconds)


def _placed(pod: StagePod | None) -> bool:
    return pod is not None and alive(pod) and pod.scheduled


def _lacking_since(d: Decision, place: Place) -> datetime | None:
    pod = d.gang.current.get(place.rank)
    if pod is None or (pod.gate is not None and d.seen.unplaced is None):
        return None
    return pod.unschedulable_since


def _seated(d: Decision, group: GroupStatus | None, shape: Shape, pods: list[StagePod]) -> GroupStatus:
    """Give every place of a smaller shape one of ``pods``: its own where that is there, else one that has none."""
    own = {key_of(pod.place): pod for pod in pods}
    places = shape.places()
    free = [pod for pod in pods if key_of(pod.place) not in {key_of(place) for place in places}]
    numbers = {(item.pipeline, item.index): item.replacement for item in d.draft.stages}
    moves, first = [], own.get((0, 0))
    for place in places:
        if key_of(place) in own:
            continue
        pod = free.pop(0)
        first = pod if place.rank == 0 else first
        number = numbers.get(key_of(place), 0) + 1
        moves.append(Move(pod=pod.name, stage=place.stage, pipeline=place.pipeline, replacement=number))
    assert first is not None
    _renumber(d, moves, pods)
    leavers = [pod.name for pod in free] if group else []
    return _group(d, shape, first.address, leavers).model_copy(update={"moves": moves})


def _renumber(d: Decision, moves: list[Move], pods: list[StagePod]) -> None:
    """Count the moved pods at their new places, and see to it that their old places get pods of other names."""
    numbers = {(move.pipeline, move.stage): move.replacement for move in moves}
    left = {key_of(pod.place) for pod in pods if pod.name in {move.pod for move in moves}}
    d.draft.set(
        stages=[
            item.model_copy(update={"replacement": numbers[key]})
            if (key := (item.pipeline, item.index)) in numbers
            else item.model_copy(update={"replacement": item.replacement + 1, "pod": "", "node": ""})
            if key in left
            else item
            for item in d.draft.stages
        ]
    )


def _kept(d: Decision, group: GroupStatus) -> GroupStatus | None:
    """Return the group of the same shape, where stage 0 has another address, or one that was giving is lost."""
    first = d.gang.current.get(0)
    moved = first is not None and alive(first) and first.address not in ("", group.master_address)
    lost = [name for name in group.leavers if name not in group.released and not _giving(d, name)]
    behind = any(told.epoch > d.job.status.epoch for pod in d.seen.pods if (told := membership.current(pod.membership)))
    if not (moved or lost or behind):
        return None
    address = first.address if first is not None and moved else group.master_address
    giving = [name for name in group.leavers if name in d.gang.leavers and name not in lost]
    return _group(d, d.gang.shape, address, giving).model_copy(update={"moves": group.moves})


def _giving(d: Decision, name: str) -> bool:
    pod = d.gang.leavers.get(name)
    return pod is not None and not pod.over and pod.node not in d.seen.unready_nodes


def _released(d: Decision, group: GroupStatus) -> GroupStatus | None:
    """Return the group with those marked that have given all; None where nobody new has."""
    done = [
        name
        for name, pod in d.gang.leavers.items()
        if pod.address in d.seen.released or (pod.over and pod.ended and pod.ended.exit_code in ENDED_WELL)
    ]
    return group.model_copy(update={"released": [*group.released, *done]}) if done else None


def _group(d: Decision, shape: Shape, address: str, leavers: list[str]) -> GroupStatus:
    """Return a group of this shape. Who leaves gives what it holds, which is nothing where nobody trains."""
    if d.job.spec.mode != "Train":
        leavers = []
    return GroupStatus(stages=shape.stages, pipelines=shape.pipelines, master_address=address, leavers=leavers)
