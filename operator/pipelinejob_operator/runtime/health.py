"""Liveness, readiness and metrics over HTTP.

Alive: the event loop and every queue worker have moved lately, and a LIST succeeded not too long ago; so a
dead watch, a stuck worker or lost credentials end in a restart. Ready: the cache is complete, whether this
replica leads or not.
"""

from collections.abc import Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

STUCK_SECONDS = 120.0
"""A worker that has not finished a reconcile for so long is stuck: each of its requests ends after 30 s."""


class Health:
    """What the process knows of its own parts. ``clock`` returns seconds that never go back."""

    def __init__(
        self,
        clock: Callable[[], float],
        relist_seconds: float,
        last_list: Callable[[], float | None],
        synced: Callable[[], bool],
    ) -> None:
        self._clock, self._last_list, self._synced = clock, last_list, synced
        self._list_limit = max(3 * relist_seconds, STUCK_SECONDS)
        self._started = clock()
        self._busy_since: dict[str, float] = {}

    def busy(self, worker: str) -> None:
        """Note that a worker begins a reconcile."""
        self._busy_since[worker] = self._clock()

    def idle(self, worker: str) -> None:
        """Note that a worker waits for a key."""
        self._busy_since.pop(worker, None)

    def problems(self) -> list[str]:
        """Say why the process should be restarted; nothing where it is alive."""
        now = self._clock()
        stuck = [
            f"worker {name} has been at one reconcile for {now - since:.0f} s; allowed: {STUCK_SECONDS:.0f}"
            for name, since in self._busy_since.items()
            if now - since > STUCK_SECONDS
        ]
        age = now - (self._last_list() or self._started)
        if age > self._list_limit:
            stuck.append(f"no LIST has succeeded for {age:.0f} s; allowed: {self._list_limit:.0f}")
        return stuck

    async def serve(self, port: int) -> web.AppRunner:
        """Start the server; the caller cleans the runner up."""
        app = web.Application()
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._metrics)
        runner = web.AppRunner(app, handle_signals=False, shutdown_timeout=1.0)
        await runner.setup()
        await web.TCPSite(runner, port=port).start()
        return runner

    async def _healthz(self, _: web.Request) -> web.Response:
        problems = self.problems()
        return web.Response(status=503 if problems else 200, text="; ".join(problems) or "alive")

    async def _readyz(self, _: web.Request) -> web.Response:
        ready = self._synced()
        return web.Response(status=200 if ready else 503, text="ready" if ready else "the cache is not complete yet")

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})
