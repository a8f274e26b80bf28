"""Which requests run, which of their tokens go into the next batch, and which blocks of the cache they use.

Continuous batching at the level of iterations (Yu et al. 2022, Orca) with paged blocks and preemption by recomputation
(Kwon et al. 2023, vLLM) and chunked prefill (Agrawal et al. 2023, Sarathi), for a pipeline: several batches are in
flight, each with other requests, except that the chunks of one prompt follow each other without waiting.

Nothing here reads a clock or does I/O, and equal calls give equal batches.
"""

from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Literal

from pipelinejob_worker.serve.batch import BLOCK, Batch, Drawn, Piece, blocks_for
from pipelinejob_worker.serve.wire import Sampling

CALL_TOKENS = 32
"""A stage's call costs as much beside its tokens as so many tokens do: it reads the weights. No chunk of a prompt is
smaller."""

Key = tuple[int, str]
"""Of a request: the connection that it came over, and its name there."""

Reason = Literal["stop", "length", "cancelled", "deadline", "error"]


@dataclass(frozen=True)
class Limits:
    """What the group of stages can hold."""

    blocks: int
    """Of the cache, as many as the stage with the fewest has."""

    context: int
    """Most tokens of a request, prompt and output together."""

    batches: int
    """Most batches in flight."""

    batch_tokens: int
    """Most tokens of a batch."""

    accepted_tokens: int
    """Most tokens of all unfinished requests, prompts and largest outputs together."""

    @property
    def request_tokens(self) -> int:
        """Most tokens of one request."""
        return min(self.context, self.cache_tokens, self.accepted_tokens)

    @property
    def cache_tokens(self) -> int:
        """Most tokens of a request that has the whole cache; the last one is emitted and never read."""
        return self.blocks * BLOCK + 1


@dataclass(frozen=True)
class Request:
    """A request as it was submitted; times are seconds of one clock."""

    key: Key
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    deadline: float
    emitted: tuple[int, ...] = ()
    stop_tokens: frozenset[int] = frozenset()
    ends: Callable[[int], bool] = field(default=lambda _: False)
    """Told each token in turn, those emitted earlier included; whether the request ends with it."""

    priority: int = 0

    @property
    def most_tokens(self) -> int:
        """Tokens that it can come to."""
        return len(self.prompt) + self.max_tokens


@dataclass(frozen=True)
class Refusal:
    """Why a request is not accepted: it never can be, or not now."""

    reason: Literal["too_large", "overloaded"]
    message: str


@dataclass(frozen=True)
class Emitted:
    """A new token of a request."""

    key: Key
    position: int
    drawn: Drawn


@dataclass(frozen=True)
class Ended:
    """The end of a request."""

    key: Key
    reason: Reason
    message: str = ""


Event = Emitted | Ended


@dataclass(eq=False)
class _Running:
    """An accepted request; it waits while ``blocks`` is empty."""

    request: Request
    rank: tuple[int, int]
    """Order of admission and, reversed, of preemption: priority, then arrival."""

    tokens: list[int]
    sent: int = 0
    """Tokens whose keys and values are computed, or are going to be by batches in flight."""

    blocks: list[int] = field(default_factory=list)
    in_flight: int = 0
    last_batch: int = -1
    ended: bool = False

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.sent

    def __lt__(self, other: "_Running") -> bool:
        return self.rank < other.rank


class Scheduler:
    """One pool of requests. Not for use by several threads."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.preemptions = 0
        self._accepted: dict[Key, _Running] = {}
        self._queue: list[_Running] = []
        self._running: list[_Running] = []
        self._free = list(range(limits.blocks, 0, -1))
        self._in_flight: dict[int, list[tuple[_Running, Piece]]] = {}
        self._arrivals = 0
        self._batches = 0

    @property
    def accepted_tokens(self) -> int:
        """Tokens of all unfinished requests, prompts and largest outputs together."""
        return sum(running.request.most_tokens for running in self._accepted.values())

    @property
    def queued(self) -> int:
        """Accepted requests without cache."""
        return len(self._accepted) - len(self._running)

    @property
    def running(self) -> int:
        """Requests with cache."""
        return len(self._running)

    @property
    def batches_in_flight(self) -> int:
        """Batches that have left and have not come back."""
        return len(self._in_flight)

    @property
    def used_blocks(self) -> int:
        """Blocks that requests hold."""
        return self.limits.blocks - len(self._free)

    def unfinished(self) -> list[Key]:
        """Return the keys of all unfinished requests."""
        return list(self._accepted)

    def __contains__(self, key: object) -> bool:
        return key in self._accepted

    def submit(self, request: Request) -> Refusal | list[Event]:
        """Accept a request, whose key must be new, or say why not. It may have ended with the tokens that it brings.

        One with tokens of an earlier epoch was accepted then, so it is never refused as overload.
        """
        if refusal := self._refuse(request):
            return refusal
        running = _Running(request, (-request.priority, self._arrivals), [*request.prompt, *request.emitted])
        self._arrivals += 1
        self._accepted[request.key] = running
        insort(self._queue, running)
        for count, token in enumerate(request.emitted, 1):
            if reason := _reason(request, count, token):
                return [self._end(running, reason)]
        return []

    def end(self, key: Key, reason: Reason, message: str = "") -> list[Event]:
        """End a request for a reason from outside; none is known under ``key`` when it has ended before."""
        running = self._accepted.get(key)
        return [self._end(running, reason, message)] if running else []

    def expire(self, now: float) -> list[Event]:
        """End the requests whose deadline has passed."""
        late = [running for running in self._accepted.values() if running.request.deadline <= now]
        return [self._end(running, "deadline") for running in late]

    def next_deadline(self) -> float | None:
        """When ``expire`` next has something to end."""
        return min((running.request.deadline for running in self._accepted.values()), default=None)

    def next_batch(self) -> Batch | None:
        """Compose a batch that is to leave now; None when none can, until one comes back or a request is submitted."""
        if len(self._in_flight) >= self.limits.batches:
            return None
        self._admit()
        number = self._batches
        sent: list[tuple[_Running, Piece]] = []
        tokens: list[int] = []
        for running, count in self._choose():
            end = running.sent + count
            tokens += running.tokens[running.sent : end]
            sampling = running.request.sampling if end == len(running.tokens) else None
            sent.append((running, Piece(running.sent, count, tuple(running.blocks[: blocks_for(end)]), sampling)))
            running.sent = end
            running.in_flight += 1
            running.last_batch = number
        if not sent:
            return None
        self._batches += 1
        self._in_flight[number] = sent
        return Batch(number, tuple(piece for _, piece in sent), tuple(tokens))

    def complete(self, number: int, drawn: Sequence[Drawn]) -> list[Event]:
        """Take back a batch with the tokens drawn behind its pieces, in their order."""
        events: list[Event] = []
        results = iter(drawn)
        for running, piece in self._in_flight.pop(number):
            running.in_flight -= 1
            if not piece.sampling:
                continue
            result = next(results)
            if not running.ended:
                events += self._emit(running, result)
        return events

    def _refuse(self, request: Request) -> Refusal | None:
        limits, total = self.limits, request.most_tokens
        for limit, what in (
            (limits.context, "the context of the model"),
            (limits.cache_tokens, "the key-value cache"),
            (limits.accepted_tokens, "all that is accepted at a time"),
        ):
            if total > limit:
                return Refusal(
                    "too_large",
                    f"{len(request.prompt)} tokens of prompt and {request.max_tokens} of output are more than "
                    f"{what}; allowed: {limit} together",
                )
        accepted = self.accepted_tokens
        if not request.emitted and accepted + total > limits.accepted_tokens:
            return Refusal(
                "overloaded",
                f"{accepted} tokens are accepted and unfinished, and {total} more would exceed "
                f"{limits.accepted_tokens}; try again later",
            )
        return None

    def _emit(self, running: _Running, drawn: Drawn) -> Iterator[Event]:
        if drawn.token is None:
            yield self._end(running, "error", "the model's logits are not finite")
            return
        position = len(running.tokens)
        running.tokens.append(drawn.token)
        yield Emitted(running.request.key, position, drawn)
        if reason := _reason(running.request, position + 1 - len(running.request.prompt), drawn.token):
            yield self._end(running, reason)

    def _end(self, running: _Running, reason: Reason, message: str = "") -> Ended:
        """Links are first in, first out, so the blocks may be given away although batches still write to them."""
        running.ended = True
        del self._accepted[running.request.key]
        if running.blocks:
            self._release(running)
        else:
            self._queue.remove(running)
        return Ended(running.request.key, reason, message)

    def _release(self, running: _Running) -> None:
        self._free += running.blocks
        running.blocks = []
        self._running.remove(running)

    def _admit(self) -> None:
        """Give blocks for all known tokens to the first of the queue, as long as each running one can still grow."""
        while self._queue and len(self._running) < self.limits.batches * self.limits.batch_tokens:
            first = self._queue[0]
            needed = blocks_for(len(first.tokens))
            if needed + len(self._running) > len(self._free):
                return
            first.blocks = [self._free.pop() for _ in range(needed)]
            self._running.append(self._queue.pop(0))

    def _choose(self) -> Iterator[tuple[_Running, int]]:
        """Take this batch's share: first of the single tokens, then of the prompts, which fill it up.

        What is taken must be marked as in flight before the next is asked for.
        """
        load = sum(running.pending for running in self._running) + self._tokens_in_flight()
        prompts = sorted(running for running in self._running if running.pending > 1)
        singles = [running for running in self._running if running.pending == 1]
        singles.sort(key=lambda running: (running.last_batch, running.rank))  # who has waited longest
        budget = self.limits.batch_tokens
        idle = self.limits.batches - len(self._in_flight)
        share = min(self._share(len(self._running)), -(-len(singles) // idle))
        most = min(share, budget // 2 if prompts else budget)
        taken = 0
        for running in singles:
            if taken == most:
                break
            if self._grow(running):
                taken += 1
                yield running, 1
        room = min(budget - taken, max(self._chunk(load) - taken, CALL_TOKENS))  # however many generate
        for running in prompts:
            count = min(running.pending, room)
            if running.blocks and count > 0:  # it has none when it was preempted for a single token
                room -= count
                yield running, count

    def _chunk(self, load: int) -> int:
        """Return the tokens of a batch with which the last of a load leaves the last of p stages soonest.

        In k batches it takes (k + p - 1) calls, each with the k-th part of the tokens: least for this k, that of the
        segments of a pipelined broadcast.
        """
        stages = self.limits.batches
        count = max(stages, round(sqrt(load * (stages - 1) / CALL_TOKENS)))
        return max(-(-load // count), CALL_TOKENS)

    def _share(self, total: int) -> int:
        return -(-total // self.limits.batches)

    def _tokens_in_flight(self) -> int:
        return sum(piece.count for batch in self._in_flight.values() for _, piece in batch)

    def _grow(self, running: _Running) -> bool:
        """Have a block for the next token of a request, if need be one of a younger request."""
        if not running.blocks:
            return False  # preempted for one before it in this batch
        if running.sent < len(running.blocks) * BLOCK:
            return True
        if not self._free and not self._preempt(running):
            return False
        running.blocks.append(self._free.pop())
        return True

    def _preempt(self, asker: _Running) -> bool:
        """Take the blocks of the last in rank behind ``asker`` that is not in flight; it will be computed anew."""
        idle = [running for running in self._running if asker < running and not running.in_flight]
        if not idle:
            return False
        victim = max(idle)
        self._release(victim)
        victim.sent = 0
        insort(self._queue, victim)
        self.preemptions += 1
        return True


def _reason(request: Request, emitted: int, token: int) -> Reason | None:
    """Why a request ends with its token number ``emitted``."""
    if request.ends(token) or token in request.stop_tokens:
        return "stop"
    return "length" if emitted >= request.max_tokens else None
