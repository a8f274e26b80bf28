"""The paginated re-list, the watch's safety net: it drops what the watch missed the deletion of."""

import asyncio
import random
from collections.abc import Callable

import aiohttp
import structlog

from pipelinejob_operator.build.names import MANAGED_BY, MANAGED_BY_LABEL
from pipelinejob_operator.runtime import metrics
from pipelinejob_operator.runtime.cache import Cache, Key, Manifest
from pipelinejob_operator.runtime.client import JOBS, PODS, ApiError, Kubernetes, Resource

JITTER = 0.1
RETRY_SECONDS = 2.0
POD_SELECTOR = f"{MANAGED_BY_LABEL}={MANAGED_BY}"

log = structlog.get_logger(__name__)


class Relist:
    """Lists everything every ``seconds``, give or take, and brings the cache in line."""

    def __init__(
        self,
        kubernetes: Kubernetes,
        cache: Cache,
        *,
        namespace: str,
        seconds: float,
        clock: Callable[[], float],
        wake: Callable[[Key], None],
    ) -> None:
        self._kubernetes, self._cache, self._namespace = kubernetes, cache, namespace
        self._seconds, self._clock, self._wake = seconds, clock, wake
        self.last_success: float | None = None
        self.synced = asyncio.Event()

    async def run(self) -> None:
        """List for ever; a failure is tried again soon."""
        while True:
            try:
                await self._once()
            except (ApiError, aiohttp.ClientError, TimeoutError) as error:
                log.warning("cannot list", error=str(error))
                await asyncio.sleep(RETRY_SECONDS)
                continue
            await asyncio.sleep(self._seconds * (1 + random.uniform(-JITTER, JITTER)))  # noqa: S311 - spreads load

    async def _once(self) -> None:
        first = not self.synced.is_set()
        jobs, jobs_version = await self._list(JOBS)
        pods, pods_version = await self._list(PODS, POD_SELECTOR)
        changed, job_drift = self._cache.replace_jobs(jobs, jobs_version)
        of_pods, pod_drift = self._cache.replace_pods(pods, pods_version)
        for kind, drift in (("job", job_drift), ("pod", pod_drift)):
            if not first and (drift.ghosts or drift.stale):
                log.warning("the watch had missed something", kind=kind, ghosts=drift.ghosts, stale=drift.stale)
                metrics.DRIFT.labels(kind, "ghost").inc(drift.ghosts)
                metrics.DRIFT.labels(kind, "stale").inc(drift.stale)
        self.last_success = self._clock()
        self.synced.set()
        for key in changed | of_pods | {key for key, _ in self._cache.jobs()}:
            self._wake(key)

    async def _list(self, resource: Resource, labels: str = "") -> tuple[list[Manifest], int]:
        found: list[Manifest] = []
        version = 0
        async for items, version in self._kubernetes.pages(resource, self._namespace, labels):  # noqa: B007
            found += items
        return found, version
