"""The paginated re-list, the watch's safety net: it drops what the watch missed the deletion of.

kopf says nothing of what was deleted while its watch was away for so long that it had to begin with a list of its own
(``continuous_watch`` in ``kopf/_cogs/clients/watching.py``), for instance after a restart of the API server. So such a
list is followed by one of ours; and one comes every few minutes, whatever happens.
"""

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress

import aiohttp
import structlog

from pipelinejob_operator.build.names import MANAGED_BY, MANAGED_BY_LABEL
from pipelinejob_operator.runtime import metrics
from pipelinejob_operator.runtime.cache import Cache, Key, Manifest, is_ours
from pipelinejob_operator.runtime.client import JOBS, NODES, PODS, ApiError, Kubernetes, Resource
from pipelinejob_operator.runtime.inventory import Inventory

JITTER = 0.1
RETRY_SECONDS = 2.0
SETTLE_SECONDS = 0.5
"""kopf's list tells of many objects; one list of ours follows."""
POD_SELECTOR = f"{MANAGED_BY_LABEL}={MANAGED_BY}"

log = structlog.get_logger(__name__)


class Relist:
    """Lists everything every ``seconds``, give or take, and brings the cache in line."""

    def __init__(
        self,
        kubernetes: Kubernetes,
        cache: Cache,
        inventory: Inventory | None,
        *,
        namespace: str,
        seconds: float,
        clock: Callable[[], float],
        wake: Callable[[Key], None],
    ) -> None:
        self._kubernetes, self._cache, self._inventory = kubernetes, cache, inventory
        self._namespace = namespace
        self._seconds, self._clock, self._wake = seconds, clock, wake
        self.last_success: float | None = None
        self.synced = asyncio.Event()
        self._wanted = asyncio.Event()

    def soon(self) -> None:
        """List soon: the watch has begun anew."""
        self._wanted.set()

    async def run(self) -> None:
        """List for ever; a failure is tried again soon."""
        while True:
            self._wanted.clear()
            try:
                await self._once()
            except (ApiError, aiohttp.ClientError, TimeoutError) as error:
                log.warning("cannot list", error=str(error))
                await asyncio.sleep(RETRY_SECONDS)
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(self._seconds * (1 + random.uniform(-JITTER, JITTER))):  # noqa: S311 - spreads load
                    await self._wanted.wait()
                    await asyncio.sleep(SETTLE_SECONDS)

    async def _once(self) -> None:
        first = not self.synced.is_set()
        jobs, jobs_version = await self._list(JOBS)
        pods, pods_version = await self._pods(self._inventory)
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

    async def _pods(self, inventory: Inventory | None) -> tuple[list[Manifest], int]:
        """List the jobs' pods; with an inventory all pods and nodes, of which only a page at a time is held."""
        if inventory is None:
            return await self._list(PODS, POD_SELECTOR)
        ours: list[Manifest] = []
        nodes: set[str] = set()
        pods: set[str] = set()
        version = 0
        async for items, version in self._kubernetes.pages(NODES, ""):  # noqa: B007
            for node in items:
                inventory.put_node(node)
                nodes.add(node["metadata"]["uid"])
        ghosts = inventory.keep_nodes(nodes, version)
        async for items, version in self._kubernetes.pages(PODS, self._namespace):  # noqa: B007
            for pod in items:
                inventory.put_pod(pod)
                pods.add(pod["metadata"]["uid"])
            ours += [pod for pod in items if is_ours(pod)]
        ghosts += inventory.keep_pods(pods, version)
        if ghosts and self.synced.is_set():
            metrics.DRIFT.labels("inventory", "ghost").inc(ghosts)
        return ours, version

    async def _list(self, resource: Resource, labels: str = "") -> tuple[list[Manifest], int]:
        found: list[Manifest] = []
        version = 0
        async for items, version in self._kubernetes.pages(resource, self._namespace, labels):  # noqa: B007
            found += items
        return found, version
