"""The membership of one stage: who it is, who its neighbours are, and where the group meets."""

from collections.abc import Mapping

from pipelinejob_operator.build.place import Place
from pipelinejob_operator.policy.facts import StagePod
from pipelinejob_worker.protocol import OLDEST_READER, RENDEZVOUS_PORT, Membership

PIPELINES_SINCE = 3
"""Protocol version that knows several pipelines: an older agent would join as a stage of the only one."""


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
