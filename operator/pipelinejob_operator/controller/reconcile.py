"""One reconcile: observe, plan, execute, and one status write at the end, only when it changed."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import structlog
from pydantic import ValidationError

from pipelinejob_operator.build.installation import Installation
from pipelinejob_operator.build.job import Job
from pipelinejob_operator.controller.actions import ApplyObject, CreatePod, PlaceGang
from pipelinejob_operator.controller.execute import Executor, render
from pipelinejob_operator.controller.observe import Observer
from pipelinejob_operator.controller.observed import Refusal, Unplaced
from pipelinejob_operator.controller.placer import Placer
from pipelinejob_operator.controller.plan import Plan, plan, unreadable
from pipelinejob_operator.controller.refusals import refusal
from pipelinejob_operator.runtime import events, metrics
from pipelinejob_operator.runtime.cache import Cache, Key
from pipelinejob_operator.runtime.client import Kubernetes

log = structlog.get_logger(__name__)


@dataclass
class _Memory:
    """What may be forgotten at any time: it only saves calls."""

    uid: str
    network_checked: datetime | None = None
    network_generation: int = 0
    refusal: Refusal | None = None
    refusals: int = 0
    unplaced: Unplaced | None = None


class Reconciler:
    """Brings one job at a time closer to what its spec says. ``clock`` returns the time of day in UTC."""

    def __init__(
        self,
        kubernetes: Kubernetes,
        cache: Cache,
        observer: Observer,
        placer: Placer | None,
        *,
        installation: Installation,
        instance: str,
        network_period: timedelta,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._kubernetes, self._cache, self._observer = kubernetes, cache, observer
        self._executor, self._placer = Executor(kubernetes, cache, placer), placer
        self._installation, self._instance = installation, instance
        self._network_period, self._clock = network_period, clock
        self._memory: dict[Key, _Memory] = {}

    async def reconcile(self, key: Key) -> float | None:
        """Do the next thing for a job; return in how many seconds to look again even if nothing happens.

        Raises ``ApiError`` or a network error where a call failed: the queue then backs off.
        """
        with structlog.contextvars.bound_contextvars(job=str(key), trace=secrets.token_hex(8)):
            decided = await self._decide(key)
            if decided is None:
                return None
            job, made = decided
            if made.actions and await self._execute(key, job, made):
                return 0
            changed = render(made.status) != render(job.status)
            if changed:
                await self._executor.write_status(job, made.status)
                self._tell(job, made)
                await events.publish(self._kubernetes, job, made.notices, self._instance)
            if changed or made.actions:
                return 0
            if made.look_again_at is None:
                return None
            return max(0.0, (made.look_again_at - self._clock()).total_seconds())

    async def _decide(self, key: Key) -> tuple[Job, Plan] | None:
        """Plan from the cache, and once more from a fresh read where the plan would be irreversible."""
        decided = await self._plan(key)
        if decided and decided[1].irreversible:
            await self._observer.refresh(key, decided[0].uid)
            decided = await self._plan(key)
        return decided

    async def _plan(self, key: Key) -> tuple[Job, Plan] | None:
        manifest = self._cache.job(key)
        if manifest is None:
            self._memory.pop(key, None)
            return None
        now = self._clock()
        try:
            job = Job.read(manifest)
        except ValidationError as error:
            job = Job.read_header(manifest)
            log.warning("cannot read the spec", errors=error.error_count())
            return job, unreadable(job, _first_line(error), now)
        memory = self._recall(key, job)
        due = (
            memory.network_checked is None
            or now - memory.network_checked >= self._network_period
            or memory.network_generation != job.generation
        )
        job = self._observer.with_source(job)
        seen = await self._observer.look(job, refusal=memory.refusal, network_due=due, now=now)
        if self._placer is not None:
            seen = self._placer.look(job, seen, memory.unplaced)
        return job, plan(job, seen, now, self._installation)

    def _recall(self, key: Key, job: Job) -> _Memory:
        """Return what is remembered of this very job, nothing of one of the same name before it."""
        memory = self._memory.get(key)
        if memory is None or memory.uid != job.uid:
            memory = self._memory[key] = _Memory(job.uid)
        return memory

    async def _execute(self, key: Key, job: Job, made: Plan) -> bool:
        """Carry out a plan; True where something was refused, or there are no nodes: then plan anew at once."""
        memory = self._recall(key, job)
        log.debug("executing", actions=[type(action).__name__ for action in made.actions])
        refused = await self._executor.execute(job, made.actions)
        if any(isinstance(action, ApplyObject) for action in made.actions):
            memory.network_checked, memory.network_generation = self._clock(), job.generation
        if any(isinstance(action, PlaceGang) for action in made.actions):
            memory.unplaced = refused if isinstance(refused, Unplaced) else None
        if isinstance(refused, Unplaced):
            return True
        if refused is None:
            if any(isinstance(action, CreatePod) for action in made.actions):
                memory.refusal, memory.refusals = None, 0
            return False
        memory.refusal = refusal(
            job,
            what=refused.what,
            reason=refused.reason,
            words=refused.words,
            tries=memory.refusals,
            now=self._clock(),
        )
        memory.refusals += 1
        log.warning("refused", what=refused.what, reason=refused.reason, words=refused.words)
        return True

    def _tell(self, job: Job, made: Plan) -> None:
        restarts = made.status.restarts - job.status.restarts
        if restarts:
            metrics.RESTARTS.inc(restarts)
        for notice in made.notices:
            log.info("transition", reason=notice.reason, message=notice.message)


def _first_line(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"spec.{place}: {first['msg']}"
