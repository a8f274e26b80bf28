"""Retention: what is left of a job after it has finished, and for how long."""

from collections.abc import Iterable
from datetime import datetime, timedelta

from pipelinejob_operator.api.status import Status
from pipelinejob_operator.api.v1alpha1 import Spec
from pipelinejob_operator.policy.facts import Pod, parse_time


def pods_to_delete(spec: Spec, pods: Iterable[Pod]) -> list[Pod]:
    """Pods of a finished job that ``podCleanupPolicy`` gives up: the running ones, all, or none."""
    match spec.pod_cleanup_policy:
        case "None":
            return []
        case "All":
            return [pod for pod in pods if not pod.terminating]
        case "Running":
            return [pod for pod in pods if not pod.terminating and pod.active]


def delete_at(spec: Spec, status: Status) -> datetime | None:
    """When the finished job itself is deleted; None: never."""
    completion = parse_time(status.completion_time)
    if spec.ttl_seconds_after_finished is None or completion is None:
        return None
    return completion + timedelta(seconds=spec.ttl_seconds_after_finished)
