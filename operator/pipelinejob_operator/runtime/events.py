"""Kubernetes Events: what ``kubectl describe`` shows of a job's history."""

import hashlib
from datetime import UTC, datetime

import aiohttp
import structlog

from pipelinejob_operator.api.v1alpha1 import API_VERSION, KIND
from pipelinejob_operator.build.job import Job
from pipelinejob_operator.build.names import FIELD_MANAGER
from pipelinejob_operator.controller.transitions import Notice
from pipelinejob_operator.runtime import metrics
from pipelinejob_operator.runtime.client import CONFLICT, EVENTS, ApiError, Kubernetes

MESSAGE_LIMIT = 1024

log = structlog.get_logger(__name__)


async def publish(kubernetes: Kubernetes, job: Job, notices: tuple[Notice, ...], instance: str) -> None:
    """Create an Event for each notice; named after its occasion, so a second try makes no second one.

    A refused Event is logged and given up: history must not hold up the job.
    """
    for notice in notices:
        try:
            await kubernetes.create(EVENTS, manifest(job, notice, instance, datetime.now(UTC)))
            metrics.WRITES.labels("event").inc()
        except (ApiError, aiohttp.ClientError, TimeoutError) as error:
            if not isinstance(error, ApiError) or error.code != CONFLICT:
                log.warning("cannot create an Event", reason=notice.reason, error=str(error))


def manifest(job: Job, notice: Notice, instance: str, now: datetime) -> dict[str, object]:
    """Build a core/v1 Event."""
    identity = hashlib.sha256(f"{job.uid}/{notice.reason}/{notice.occasion}".encode()).hexdigest()[:16]
    time = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{job.name}.{identity}", "namespace": job.namespace},
        "involvedObject": {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "name": job.name,
            "namespace": job.namespace,
            "uid": job.uid,
        },
        "type": notice.kind,
        "reason": notice.reason,
        "message": notice.message[:MESSAGE_LIMIT],
        "source": {"component": FIELD_MANAGER},
        "reportingComponent": FIELD_MANAGER,
        "reportingInstance": instance,
        "firstTimestamp": time,
        "lastTimestamp": time,
        "count": 1,
    }
