"""The membership of one stage: who it is, who its neighbours are, and where the group meets."""

from collections.abc import Mapping

from pipelinejob_operator.policy.facts import StagePod
from pipelinejob_worker.protocol import RENDEZVOUS_PORT, Membership


def membership(gang: Mapping[int, StagePod], stage: int, attempt: int) -> Membership:
    """Build the membership of ``stage``; ``gang`` maps every stage to a pod that has an address.

    The epoch grows with the attempt, from 1.
    """
    last = len(gang) - 1
    return Membership(
        epoch=attempt + 1,
        action="Run",
        stage=stage,
        stages=len(gang),
        master_address=gang[0].address,
        master_port=RENDEZVOUS_PORT,
        previous_address=gang[stage - 1].address if stage > 0 else "",
        next_address=gang[stage + 1].address if stage < last else "",
    )
