"""The workers: each takes a key from the queue, has it reconciled, and says when to look again."""

import asyncio
import time
from collections.abc import Sequence
from typing import Protocol

import aiohttp
import structlog

from pipelinejob_operator.runtime import metrics
from pipelinejob_operator.runtime.cache import Key
from pipelinejob_operator.runtime.client import CONFLICT, UNPROCESSABLE, ApiError
from pipelinejob_operator.runtime.health import Health
from pipelinejob_operator.runtime.leader import NotLeaderError
from pipelinejob_operator.runtime.queue import WorkQueue

NOT_ROUTINE_SECONDS = 3.0
"""Who still reads what others have written over after a back-off this long has a watch that is behind."""

log = structlog.get_logger(__name__)


class Reconciles(Protocol):
    """Whoever can reconcile a key."""

    async def reconcile(self, key: Key) -> float | None:
        """Do the next thing for a job; return in how many seconds to look again."""
        ...


async def work(
    name: str, queue: WorkQueue[Key], reconciler: Reconciles, health: Health, start: Sequence[asyncio.Event]
) -> None:
    """Work for ever, once all of ``start`` are set; raises ``NotLeaderError`` when the lease is lost."""
    for event in start:
        await event.wait()
    while True:
        key, waited = await queue.take()
        metrics.QUEUE_WAIT_SECONDS.observe(waited)
        health.busy(name)
        try:
            await _one(key, queue, reconciler)
        finally:
            health.idle(name)
            queue.done(key)


async def _one(key: Key, queue: WorkQueue[Key], reconciler: Reconciles) -> None:
    """Reconcile one key. What goes wrong is logged and tried again: one job must not stop the others."""
    started = time.monotonic()
    try:
        again = await reconciler.reconcile(key)
    except NotLeaderError:
        raise
    except ApiError as error:
        stale = error.code in (CONFLICT, UNPROCESSABLE)
        metrics.RECONCILES.labels("stale" if stale else "error").inc()
        seconds = queue.retry(key)
        # Stale is routine, once or twice: somebody wrote to the object since we read it.
        routine = stale and seconds < NOT_ROUTINE_SECONDS
        log.log(10 if routine else 30, "reconcile failed", job=str(key), error=str(error), again_in=round(seconds, 1))
    except (aiohttp.ClientError, TimeoutError) as error:
        metrics.RECONCILES.labels("error").inc()
        log.warning("no answer", job=str(key), error=repr(error), again_in=round(queue.retry(key), 1))
    except Exception as error:
        metrics.RECONCILES.labels("error").inc()
        log.exception("reconcile failed", job=str(key), error=repr(error), again_in=round(queue.retry(key), 1))
    else:
        metrics.RECONCILES.labels("done").inc()
        queue.forget(key)
        if again is not None:
            queue.add_after(key, again)
    finally:
        metrics.RECONCILE_SECONDS.observe(time.monotonic() - started)
