"""Which changes of a status are worth an Event: each transition that a user would want to know of, once."""

from dataclasses import dataclass
from typing import Literal

from pipelinejob_operator.api.v1alpha1 import Status
from pipelinejob_operator.policy.reasons import ConditionType, Reason

QUIET = frozenset(
    {
        Reason.NOT_STARTED,
        Reason.CREATING,
        Reason.SCHEDULING,
        Reason.NOT_PLACED,
        Reason.STARTING,
        Reason.NOT_SUSPENDED,
        Reason.ACTIVE,
        Reason.FINISHED,
        Reason.NOT_ACCEPTED,
    }
)
"""Reasons that every job passes through, or that repeat another condition."""

GOOD = frozenset(
    {
        Reason.VALID,
        Reason.PLACED,
        Reason.RUNNING,
        Reason.REPLACING,
        Reason.DRAINING,
        Reason.SUSPENDED,
        Reason.STOPPING,
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
    found = []
    for item in new.conditions:
        past = before.get(item.type)
        reason = Reason(item.reason)
        if reason in QUIET or (past and (past.status, past.reason) == (item.status, item.reason)):
            continue
        if item.type == ConditionType.RUNNING and reason is Reason.STOPPING:
            continue  # said by the condition Suspended, or by what made the job stop
        kind: Literal["Normal", "Warning"] = "Normal" if reason in GOOD else "Warning"
        found.append(Notice(kind, reason, item.message, f"{item.type}/{new.attempt}/{item.last_transition_time}"))
    if new.restarts > old.restarts and not any(notice.reason is Reason.RESTARTING for notice in found):
        running = next(item for item in new.conditions if item.type == ConditionType.RUNNING)
        found.append(Notice("Warning", Reason.RESTARTING, running.message, f"restart/{new.restarts}"))
    return found
