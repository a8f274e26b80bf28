"""A work queue of keys, after the one of client-go: each is worked on once at a time and waits once at most.

A key that is added while a worker has it is handed out again afterwards, so no change is lost and none is
worked on twice at once. ``retry`` backs off exponentially per key, ``add_after`` waits; both with a jitter
that spreads load.
"""

import asyncio
import heapq
import random
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

FIRST_RETRY_SECONDS = 0.2
LONGEST_RETRY_SECONDS = 60.0
JITTER = 0.2
"""Retries come this share later at most."""


class WorkQueue(Generic[K]):
    """Keys that want work. ``clock`` returns seconds that never go back; ``jitter`` returns 0 to 1."""

    def __init__(self, clock: Callable[[], float], jitter: Callable[[], float] = random.random) -> None:
        self._clock, self._jitter = clock, jitter
        self._ready: OrderedDict[K, float] = OrderedDict()
        self._working: set[K] = set()
        self._again: dict[K, float] = {}
        self._due: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._count = 0
        self._failures: dict[K, int] = {}
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        """Count the keys that could be taken now."""
        self._promote()
        return len(self._ready)

    @property
    def delayed(self) -> int:
        """Count the keys that wait for their time."""
        return len(self._due)

    def add(self, key: K) -> None:
        """Want work on a key now."""
        self._due.pop(key, None)
        if key in self._working:
            self._again.setdefault(key, self._clock())
        elif key not in self._ready:
            self._ready[key] = self._clock()
            self._changed.set()

    def add_after(self, key: K, seconds: float) -> None:
        """Want work on a key later; of two times for one key the earlier holds."""
        if seconds <= 0:
            self.add(key)
            return
        due = self._clock() + seconds
        if key in self._ready or key in self._again or due >= self._due.get(key, due + 1):
            return
        self._due[key] = due
        self._count += 1
        heapq.heappush(self._heap, (due, self._count, key))
        self._changed.set()

    def retry(self, key: K) -> float:
        """Want work on a key that failed, after a back-off; return its seconds."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        seconds = min(FIRST_RETRY_SECONDS * 2.0 ** min(failures, 30), LONGEST_RETRY_SECONDS)
        seconds *= 1 + JITTER * self._jitter()
        self.add_after(key, seconds)
        return seconds

    def forget(self, key: K) -> None:
        """Reset the back-off of a key that succeeded."""
        self._failures.pop(key, None)

    async def take(self) -> tuple[K, float]:
        """Wait for a key and return it with the seconds it was ready for; ``done`` must follow."""
        while True:
            self._promote()
            if self._ready:
                key, since = self._ready.popitem(last=False)
                self._working.add(key)
                return key, self._clock() - since
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._until_next()):
                    await self._changed.wait()

    def done(self, key: K) -> None:
        """Give a key back; if it was added meanwhile, it is ready again."""
        self._working.discard(key)
        if key in self._again:
            self._ready[key] = self._again.pop(key)
            self._changed.set()

    def _promote(self) -> None:
        """Move the keys whose time has come; entries that lost to an earlier time are skipped."""
        now = self._clock()
        while self._heap and self._heap[0][0] <= now:
            due, _, key = heapq.heappop(self._heap)
            if self._due.get(key) == due:
                self.add(key)

    def _until_next(self) -> float | None:
        return max(0.0, self._heap[0][0] - self._clock()) if self._heap else None
