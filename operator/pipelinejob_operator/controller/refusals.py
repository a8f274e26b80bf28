"""What the API server's no to one of our objects means for the job. Pure."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from pipelinejob_operator.build.job import Job
from pipelinejob_operator.controller.observed import Refusal
from pipelinejob_operator.policy.reasons import Reason

FIRST_WAIT_SECONDS = 2
LONGEST_WAIT_SECONDS = 60

CURES = {
    Reason.QUOTA_EXCEEDED: "raise the ResourceQuota, free some of it, or ask for less",
    Reason.LIMIT_RANGE_EXCEEDED: (
        "set resources of the container worker in spec.template within the limits of the namespace's LimitRange"
    ),
    Reason.POD_SECURITY_VIOLATION: (
        "remove from spec.template and spec.network what the namespace's pod security level forbids, such as "
        "hostNetwork"
    ),
    Reason.NAME_TAKEN: "delete that object, or give the job another name",
    Reason.POD_REFUSED: "mend what it names",
}

_MARKS = (
    ("exceeded quota", Reason.QUOTA_EXCEEDED),
    ("failed quota", Reason.QUOTA_EXCEEDED),
    ("violates PodSecurity", Reason.POD_SECURITY_VIOLATION),
    (" usage per ", Reason.LIMIT_RANGE_EXCEEDED),
    (" limit to request ratio per ", Reason.LIMIT_RANGE_EXCEEDED),
)
"""What the admission plugins write: the API has no field that tells them apart."""


@dataclass(frozen=True)
class Refused:
    """The API server will not have one of the job's objects."""

    what: str
    reason: Reason
    words: str


def classify(message: str) -> Reason:
    """Tell which admission plugin refused."""
    return next((reason for mark, reason in _MARKS if mark in message), Reason.POD_REFUSED)


def refusal(job: Job, *, what: str, reason: Reason, words: str, tries: int, now: datetime) -> Refusal:
    """Put a refusal into words: what, the server's own words, the cure; and wait 2, 4 ... 60 s."""
    wait = min(FIRST_WAIT_SECONDS << min(tries, 16), LONGEST_WAIT_SECONDS)
    message = (
        f"{what} was refused, so no stage starts: {words}; {CURES[reason]}; the job asks again every "
        f"{LONGEST_WAIT_SECONDS} s or sooner"
    )
    return Refusal(reason, message, job.generation, now + timedelta(seconds=wait))
