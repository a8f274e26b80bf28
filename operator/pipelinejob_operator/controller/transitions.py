"""Which changes of a status are worth an Event: each transition that a user would want to know of, once."""

from dataclasses import dataclass
from typing import Literal

from pipelinejob_operator.api.status import Status
from pipelinejob_operator.policy.reasons import ConditionType, Reason

QUIET = frozenset(
    {
        Reason.NOT_STARTED,
        Reason.CREATING,
        Reason.SCHEDULING,
        Reason.HELD,
        Reason.WAITING_FOR_TURN,
        Reason.NOT_PLACED,
        Reason.STARTING,
        Reason.FAILURE_SEEN,
        Reason.NOT_SUSPENDED,
        Reason.NOT_SAVED_YET,
        Reason.NOT_PROTECTED_YET,
        Reason.RECOVERING,
        Reason.ACTIVE,
        Reason.FINISHED,
        Reason.NOT_ACCEPTED,
        Reason.FRONTS_NOT_READY,
    }
)
"""Reasons that every job passes through, or that repeat another condition, or the Event of a counted failure."""

GOOD = frozenset(
    {
        Reason.VALID,
        Reason.PLACED,
        Reason.RUNNING,
        Reason.SERVING,
        Reason.MODEL_NOT_SAVED,
        Reason.REPLACING,
        Reason.PROVISIONING,
        Reason.DRAINING,
        Reason.MOVING,
        Reason.RESCALING,
        Reason.PROTECTED,
        Reason.SUSPENDED,
        Reason.STOPPING,
        Reason.SAVED,
        Reason.ALL_STAGES_SUCCEEDED,
    }
)
"""Reasons of Events of type Normal; all others warn."""


@dataclass(frozen=True)
class Notice:
    """An Event to be."""

    kind: Literal["Normal", "Warning"]
    reason: Reason
    message: str
    occasion: str
    """What makes this notice another one than the same words at another time."""


def notices(old: Status, new: Status) -> list[Notice]:
    """Compare two statuses of one job."""
    before = {item.type: item for item in old.conditions}
    found: dict[Reason, Notice] = {}
    for item in new.conditions:
        past, reason = before.get(item.type), Reason(item.reason)
        if reason in QUIET or (past and (past.status, past.reason) == (item.status, item.reason)):
            continue
        # Two conditions may change for one reason: that is one occasion, told in the words of the last.
        kind: Literal["Normal", "Warning"] = "Normal" if reason in GOOD else "Warning"
        found[reason] = Notice(kind, reason, item.message, f"{new.attempt}/{item.last_transition_time}")
    if new.restarts > old.restarts:
        found |= {notice.reason: notice for notice in [_restart(old, new)]}
    return list(found.values())


def _restart(old: Status, new: Status) -> Notice:
    """Tell of a counted failure: of the whole gang's restart, or of the stage that is started again alone."""
    occasion = f"restart/{new.restarts}"
    if new.attempt != old.attempt or new.first_failure is None:
        running = next(item for item in new.conditions if item.type == ConditionType.RUNNING)
        return Notice("Warning", Reason.RESTARTING, running.message, occasion)
    return Notice("Warning", Reason.RECOVERING, new.first_failure.sentence(), occasion)
