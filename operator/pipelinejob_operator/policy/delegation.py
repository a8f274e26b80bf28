"""Which scheduler places a delegated job, by what the API server serves and the chart allows. Pure."""

from collections.abc import Collection

from pipelinejob_operator.api.placement import Placement
from pipelinejob_operator.build.delegation import AFFINITY, DELEGATES, POD_GROUP, Delegate
from pipelinejob_operator.policy.reasons import Reason, Verdict


def wanted(placement: Placement) -> Delegate | None:
    """The scheduler that the job asks for, or would like best; None for a job that is planned."""
    if placement.strategy != "Delegated":
        return None
    return POD_GROUP if placement.delegated.to == "Auto" else DELEGATES[placement.delegated.to]


def chosen(placement: Placement, *, served: bool, allowed: Collection[str]) -> Delegate | None:
    """The scheduler that the job gets; None for a job that is planned.

    ``served`` says whether the API of the wanted one is there; ``allowed`` has the names of the schedulers for which
    the chart gives the operator rights.
    """
    found = wanted(placement)
    if found is None or placement.delegated.to != "Auto":
        return found
    return found if served and found.name in allowed else AFFINITY


def hindrance(placement: Placement, *, served: bool, allowed: Collection[str]) -> Verdict | None:
    """Why the job's scheduler cannot be used; None if it can."""
    found = chosen(placement, served=served, allowed=allowed)
    if found is None or not found.apis:
        return None
    field = f"spec.placement.delegated.to: {found.name}"
    if not served:
        return Verdict(
            Reason.SCHEDULER_MISSING,
            f"{field} needs {found.resource} of {' or '.join(found.apis)}, which the API server does not serve; "
            f"{found.cure}; the job looks again by itself",
        )
    if found.writes and found.name not in allowed:
        return Verdict(
            Reason.SCHEDULER_NOT_ALLOWED,
            f"{field} needs rights to {found.resource} of {found.apis[0]}, which the operator does not have; add "
            f"{found.name} to the chart's value schedulers, or delegate to another",
        )
    return None
