"""Leadership by a Lease: at most one replica writes.

A Lease does not fence: a leader that was paused may wake up and write once more. So every membership patch
tests the value it replaces, status writes test the version they were made from, and deletes name a UID.
"""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Protocol

import aiohttp
import structlog

from pipelinejob_operator.runtime.client import CONFLICT, LEASES, ApiError, Resource

LEASE_SECONDS = 15
"""Others may take a lease that was not renewed for so long."""
DEADLINE_SECONDS = 10
"""A leader that could not renew for so long stops writing, 5 s before others may start."""
RETRY_SECONDS = 2

log = structlog.get_logger(__name__)


class LeaseStore(Protocol):
    """The API server, as far as an election needs it."""

    async def get(self, resource: Resource, namespace: str, name: str) -> dict[str, Any] | None:
        """Read an object; None where there is none."""

    async def create_lease(self, lease: dict[str, Any]) -> dict[str, Any]:
        """Create a lease; raises ``ApiError`` 409 where there is one."""

    async def replace_lease(self, lease: dict[str, Any]) -> dict[str, Any]:
        """Replace a lease; raises ``ApiError`` 409 where it is no longer as we read it."""


class NotLeaderError(Exception):
    """This replica must not write."""


class Leader:
    """One replica's part in the election. ``clock`` returns seconds that never go back."""

    def __init__(self, identity: str, namespace: str, name: str, clock: Callable[[], float]) -> None:
        self.identity = identity
        self._namespace, self._name = namespace, name
        self._clock = clock
        self._renewed_at: float | None = None
        self._seen: tuple[object, float] | None = None
        self.elected = asyncio.Event()

    @property
    def leads(self) -> bool:
        """Whether this replica may write now."""
        return self._renewed_at is not None and self._clock() - self._renewed_at < DEADLINE_SECONDS

    def require(self) -> None:
        """Raise ``NotLeaderError`` unless this replica may write now."""
        if not self.leads:
            raise NotLeaderError(f"{self.identity} does not hold lease {self._namespace}/{self._name}")

    async def run(self, kubernetes: LeaseStore) -> None:
        """Win the lease, then keep it; raises ``NotLeaderError`` once it is lost."""
        while True:
            try:
                await self.attempt(kubernetes)
            except (ApiError, aiohttp.ClientError, TimeoutError) as error:
                log.warning("cannot renew the lease", error=str(error))
            if self.elected.is_set():
                self.require()
            await asyncio.sleep(RETRY_SECONDS)

    async def release(self, kubernetes: LeaseStore) -> None:
        """Give the lease up, so that the next replica need not wait for it to expire."""
        if not self.leads:
            return
        self._renewed_at = None
        lease = await kubernetes.get(LEASES, self._namespace, self._name)
        if lease and lease["spec"].get("holderIdentity") == self.identity:
            lease["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1}
            await kubernetes.replace_lease(lease)

    async def attempt(self, kubernetes: LeaseStore) -> None:
        """Create, take over or renew the lease; a conflict means that somebody else was faster."""
        started = self._clock()
        lease = await kubernetes.get(LEASES, self._namespace, self._name)
        try:
            if lease is None:
                await kubernetes.create_lease(self._claim({"resourceVersion": ""}, transitions=0))
            elif self._free(lease):
                spec = lease["spec"]
                moved = spec.get("holderIdentity") != self.identity
                transitions = spec.get("leaseTransitions", 0) + moved
                acquired = None if moved else spec.get("acquireTime")
                await kubernetes.replace_lease(self._claim(lease["metadata"], transitions, acquired))
            else:
                return
        except ApiError as error:
            if error.code != CONFLICT:
                raise
            return
        self._renewed_at = started
        if not self.elected.is_set():
            log.info("elected", identity=self.identity)
            self.elected.set()

    def _free(self, lease: dict[str, Any]) -> bool:
        """Whether the lease is ours, given up, or expired by our own clock (never by its holder's)."""
        spec = lease["spec"]
        holder = spec.get("holderIdentity")
        if holder in (self.identity, "", None):
            return True
        mark = (holder, spec.get("renewTime"))
        if self._seen is None or self._seen[0] != mark:
            self._seen = (mark, self._clock())
        seconds: float = spec.get("leaseDurationSeconds", LEASE_SECONDS)
        return self._clock() - self._seen[1] > seconds

    def _claim(self, meta: dict[str, Any], transitions: int, acquired: str | None = None) -> dict[str, Any]:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        version = {"resourceVersion": meta["resourceVersion"]} if meta["resourceVersion"] else {}
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self._name, "namespace": self._namespace, **version},
            "spec": {
                "holderIdentity": self.identity,
                "leaseDurationSeconds": LEASE_SECONDS,
                "acquireTime": acquired or now,
                "renewTime": now,
                "leaseTransitions": transitions,
            },
        }
