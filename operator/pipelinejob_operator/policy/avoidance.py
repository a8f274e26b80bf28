"""Avoidance: nodes on which stages of a job failed again and again are asked last to hold its later pods."""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta

from pipelinejob_operator.api.recovery_status import MAX_AVOIDED, AvoidedNode
from pipelinejob_operator.policy.facts import parse_time

REPEATED = 2
"""Failures after which a node is avoided: the first may have been the stage's own."""


def noted(known: Sequence[AvoidedNode], nodes: Iterable[str], stamp: str, window: timedelta) -> list[AvoidedNode]:
    """Count one failure on each of ``nodes`` at ``stamp`` (RFC 3339); forget what lies longer back than ``window``."""
    now = parse_time(stamp)
    assert now is not None
    kept = {item.name: item for item in unexpired(known, now, window)}
    for node in nodes:
        before = kept.pop(node, None)
        failures = before.failures + 1 if before else 1
        kept[node] = AvoidedNode(name=node, failures=failures, last_failure_time=stamp)
    return list(kept.values())[-MAX_AVOIDED:]


def unexpired(known: Sequence[AvoidedNode], now: datetime, window: timedelta) -> list[AvoidedNode]:
    """Return the nodes whose last failure lies within the window."""
    return [item for item in known if (at := parse_time(item.last_failure_time)) and now < at + window]


def avoided(known: Sequence[AvoidedNode]) -> list[str]:
    """Names of the nodes that later pods take only where no other will do."""
    return sorted(item.name for item in known if item.failures >= REPEATED)
