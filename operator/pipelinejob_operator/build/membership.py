"""The membership of one stage: who it is, who its neighbours are, and where the group meets."""

from collections.abc import Mapping

from pydantic import ValidationError

from pipelinejob_operator.api.recovery_status import GroupStatus
from pipelinejob_operator.build.place import Place, Shape
from pipelinejob_operator.policy.facts import StagePod
from pipelinejob_worker.protocol import OLDEST_READER, RECOVERY_SINCE, RENDEZVOUS_PORT, Membership

PIPELINES_SINCE = 3
"""Protocol version that knows several pipelines: an older agent would join as a stage of the only one."""

_ADDRESSES = frozenset({"previous_address", "next_address", "protocol_version", "oldest_reader"})
"""Members that may be out of date: agents that recover by themselves learn their neighbours from each other."""


def membership(gang: Mapping[int, StagePod], place: Place, attempt: int, *, replicas: bool = False) -> Membership:
    """Build the membership of the stage at ``place``; ``gang`` maps every rank to a pod that has an address.

    The epoch grows with the attempt, from 1. Neighbours are those of the stage's own pipeline; the whole group meets
    at stage 0 of pipeline 0, but each of the ``replicas`` of a job that serves is a group of its own.
    """
    shape = place.shape
    master = place.pipeline * shape.stages if replicas else 0
    return Membership(
        oldest_reader=max(OLDEST_READER, PIPELINES_SINCE) if shape.pipelines > 1 else OLDEST_READER,
        epoch=attempt + 1,
        action="Run",
        stage=place.stage,
        stages=shape.stages,
        pipeline=place.pipeline,
        pipelines=shape.pipelines,
        master_address=gang[master].address,
        master_port=RENDEZVOUS_PORT,
        previous_address=gang[place.rank - 1].address if place.stage > 0 else "",
        next_address=gang[place.rank + 1].address if place.stage < shape.stages - 1 else "",
    )


def shape_of(group: GroupStatus) -> Shape:
    """Shape of the stages that train together."""
    return Shape(group.stages, group.pipelines)


def member(epoch: int, group: GroupStatus, place: Place, addresses: Mapping[int, str]) -> Membership:
    """Build the membership of a stage that trains in ``group``; ``addresses``: by rank, as far as they are known."""
    shape = place.shape
    return Membership(
        oldest_reader=RECOVERY_SINCE if group.leavers else OLDEST_READER,
        epoch=epoch,
        action="Stop" if group.stopping_since else "Run",
        stage=place.stage,
        stages=shape.stages,
        pipeline=place.pipeline,
        pipelines=shape.pipelines,
        master_address=group.master_address,
        master_port=RENDEZVOUS_PORT,
        previous_address=addresses.get(place.rank - 1, "") if place.stage > 0 else "",
        next_address=addresses.get(place.rank + 1, "") if place.stage < shape.stages - 1 else "",
        leavers=len(group.leavers),
    )


def leaver(epoch: int, group: GroupStatus, index: int) -> Membership:
    """Build the membership of the pod that is number ``index`` among those that only give what they hold."""
    return Membership(
        oldest_reader=RECOVERY_SINCE,
        epoch=epoch,
        action="Leave",
        stage=0,
        stages=group.stages,
        pipeline=0,
        pipelines=group.pipelines,
        master_address=group.master_address,
        master_port=RENDEZVOUS_PORT,
        leavers=len(group.leavers),
        leaver=index,
    )


def standby(epoch: int, group: GroupStatus, place: Place) -> Membership:
    """Build the membership of a pod that is to make itself ready for ``place`` in a later epoch."""
    return Membership(
        oldest_reader=RECOVERY_SINCE,
        epoch=epoch,
        action="Standby",
        stage=place.stage,
        stages=place.shape.stages,
        pipeline=place.pipeline,
        pipelines=place.shape.pipelines,
        master_address=group.master_address,
        master_port=RENDEZVOUS_PORT,
    )


def current(text: str | None) -> Membership | None:
    """Read a pod's annotation; None where it holds none yet, or one that nobody can read."""
    try:
        return Membership.model_validate_json(text) if text else None
    except ValidationError:
        return None


def says(text: str | None, wanted: Membership) -> bool:
    """Whether a pod's annotation tells it what is wanted already."""
    told = current(text)
    return told is not None and told.model_dump(exclude=set(_ADDRESSES)) == wanted.model_dump(exclude=set(_ADDRESSES))
