"""How fast the engine is: counters, and rates between two looks at them. Reads no clock."""

from collections import deque

from pipelinejob_worker.serve.batch import Batch
from pipelinejob_worker.serve.scheduler import Scheduler
from pipelinejob_worker.serve.wire import Stats

MOST_SECONDS = 60.0

REQUESTS_SECONDS = 10.0
"""Over how long the rate of requests is taken: they end in bursts, and the status looks every few seconds."""


class Meter:
    """Counts since the last ``stats``; times are seconds of one clock."""

    def __init__(self, now: float) -> None:
        self._since = now
        self._computed = 0
        self._emitted = 0
        self._finished = 0
        self._busy: tuple[float, ...] = ()
        self._busy_before: tuple[float, ...] = ()
        self._rate = 0.0
        self._ended: deque[tuple[float, int]] = deque()
        """Requests that have got all their tokens, with the time at which they were counted."""

    def sent(self, batch: Batch) -> None:
        """Count the tokens of a batch."""
        self._computed += batch.size

    def returned(self, drawn: int, busy: tuple[float, ...]) -> None:
        """Count drawn tokens; ``busy``: seconds that each stage has computed in all."""
        self._emitted += drawn
        self._busy = busy

    def finished(self) -> None:
        """Count a request that has got all its tokens."""
        self._finished += 1

    def stats(self, epoch: int, scheduler: Scheduler, now: float) -> Stats:
        """Return the statistics since the last call, and begin anew."""
        seconds = max(now - self._since, 1e-9)
        if self._finished:
            self._ended.append((now, self._finished))
        while self._ended and self._ended[0][0] <= now - REQUESTS_SECONDS:
            self._ended.popleft()
        self._rate = self._computed / seconds
        before = self._busy_before or (0.0,) * len(self._busy)
        shares = [min(1.0, (new - old) / seconds) for old, new in zip(before, self._busy, strict=True)]
        stats = Stats(
            epoch=epoch,
            queued=scheduler.queued,
            running=scheduler.running,
            batches_in_flight=scheduler.batches_in_flight,
            cache_blocks=scheduler.limits.blocks,
            cache_blocks_used=scheduler.used_blocks,
            # All that is computed but the tokens drawn before, so that computing anew counts as well.
            prompt_tokens_per_second=max(0, self._computed - self._emitted) / seconds,
            tokens_per_second=self._emitted / seconds,
            preemptions=scheduler.preemptions,
            bubble_percent=100 * (1 - sum(shares) / len(shares)) if shares else 100.0,
            requests_per_second=sum(count for _, count in self._ended) / REQUESTS_SECONDS,
            stage_busy_percent=[100 * share for share in shares],
        )
        self._since, self._busy_before = now, self._busy
        self._computed = self._emitted = self._finished = 0
        return stats

    def seconds_for(self, tokens: int) -> float:
        """Return about how long that many tokens take at the last rate, 1 to 60 seconds."""
        return min(MOST_SECONDS, max(1.0, tokens / self._rate)) if self._rate else 1.0
