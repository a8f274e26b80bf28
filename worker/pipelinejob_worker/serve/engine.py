"""The loops of the stages: stage 0 composes batches and answers fronts, the others pass batches on."""

import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from pipelinejob_worker.serve.batch import Batch, Drawn
from pipelinejob_worker.serve.fronts import Arrived, Fronts, Left
from pipelinejob_worker.serve.hop import End, Hop, HopError, Passed, Returned
from pipelinejob_worker.serve.meter import Meter
from pipelinejob_worker.serve.ring import Departure, Ring
from pipelinejob_worker.serve.sampling import draw
from pipelinejob_worker.serve.scheduler import Ended, Event, Limits, Refusal, Request, Scheduler
from pipelinejob_worker.serve.text import Decode, StopWatch
from pipelinejob_worker.serve.wire import Alternative, Cancel, Finished, Ready, Refused, Stats, Submit, Token

TICK_SECONDS = 1.0
"""How often statistics are sent."""

SILENCE_SECONDS = 60.0
"""A batch that takes longer to come back is lost: a stage is stopped, or a network is cut."""

IDLE_SECONDS = 1.0
"""How often a stage that waits for batches says that it does."""

END_SECONDS = 10.0
"""How long stage 0 waits at the end until the others have heard of it."""


class Layers(Protocol):
    """The layers of a stage; see ``stage.Stage``."""

    def run(self, batch: Batch, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Pass a batch on."""


class Follower:
    """A stage other than stage 0: takes batches in order, and keeps nothing of them but keys and values."""

    def __init__(
        self, layers: Layers, ring: Ring, epoch: int, *, last: bool, departure: Departure | None = None
    ) -> None:
        self._departure = departure or Departure()
        assert ring.before is not None
        assert ring.after is not None
        self._layers, self._before, self._after = layers, ring.before, ring.after
        self._epoch = epoch
        self._last = last
        self._busy = 0.0

    def run(self) -> None:
        """Work until the end; raises HopError when a neighbour leaves before.

        The next batch is received while this one is computed, so that a stage that is behind never waits for it.
        """
        received = _received_ahead(self._before)
        while True:
            self._departure.waits()
            try:
                message = received.get(timeout=IDLE_SECONDS)
            except queue.Empty:
                continue
            if isinstance(message, _Broken):
                raise message.error
            if message.epoch < self._epoch:
                continue
            if isinstance(message, End) and message.epoch == self._epoch:
                if not self._last:  # the last one is heard by its leaving
                    self._after.send(message)
                return
            if not isinstance(message, Passed) or message.epoch > self._epoch:
                raise HopError(f"the stage before sent a message of epoch {message.epoch}; this is {self._epoch}")
            self._departure.computes()
            began = time.monotonic()
            result = self._layers.run(message.batch, message.hidden)
            drawn = drawn_behind(message.batch, result) if self._last else ()
            self._busy += time.monotonic() - began
            busy = (*message.busy, self._busy)
            if self._last:
                self._after.send(Returned(self._epoch, message.batch.number, drawn, busy))
            else:
                self._after.send(Passed(self._epoch, message.batch, result, busy))


def _received_ahead(before: Hop) -> "queue.SimpleQueue[Passed | Returned | End | _Broken]":
    """Return what comes over a hop as it comes, in a thread: no more than stage 0 has in flight; last why it ended."""
    received: queue.SimpleQueue[Passed | Returned | End | _Broken] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(before, received.put), name="receiver", daemon=True).start()
    return received


def _receive(before: Hop, put: "Callable[[Passed | Returned | End | _Broken], None]") -> None:
    try:
        while True:
            put(before.receive())
    except HopError as error:
        put(_Broken(error))


def drawn_behind(batch: Batch, logits: torch.Tensor) -> tuple[Drawn, ...]:
    """Draw the tokens behind a batch's pieces from ``logits`` ``[draws, vocabulary]``."""
    draws = batch.draws
    samplings = [piece.sampling for piece in draws if piece.sampling]
    return tuple(draw(logits, samplings, [piece.start + piece.count for piece in draws]))


@dataclass(frozen=True)
class _Broken:
    """The reader's last message: the link from the last stage ended."""

    error: HopError


_Message = Arrived | Left | Passed | Returned | End | _Broken


class Leader:
    """Stage 0: holds the pool of requests, sends batches, takes back tokens."""

    def __init__(
        self,
        layers: Layers,
        ring: Ring,
        ready: Ready,
        limits: Limits,
        decode: Decode | None,
        *,
        report: Callable[[Stats], None] = lambda _: None,
        departure: Departure | None = None,
    ) -> None:
        """``report`` is told the statistics, about once a second."""
        self._report = report
        self._departure = departure or Departure()
        self._layers = layers
        self._ring = ring
        self._ready = ready
        self._decode = decode
        self.scheduler = Scheduler(limits)
        self._meter = Meter(time.monotonic())
        self._inbox: queue.SimpleQueue[_Message | None] = queue.SimpleQueue()
        self._left_at: dict[int, float] = {}
        self._busy = 0.0
        self._answers: list[tuple[int, Token | Finished | Refused]] = []

    def stop(self) -> None:
        """Make ``run`` return; from any thread."""
        self._inbox.put(None)

    def run(self, host: str, port: int, listening: Callable[[int], None] = lambda _: None) -> None:
        """Serve fronts at ``host:port`` until ``stop``. ``listening`` is told the port, for instance when it was 0.

        Raises HopError when a stage is lost, OSError when the port is taken. All connections are closed at the end.
        """
        fronts = Fronts(host, port, self._ready, self._inbox.put)
        try:
            listening(fronts.port)
            if self._ring.before:
                # Takes tokens off the last stage's hands at any time, so that it never waits to send.
                arguments = (self._ring.before, self._inbox.put)
                threading.Thread(target=_receive, args=arguments, name="tokens", daemon=True).start()
            self._loop(fronts)
            self._end()
        finally:
            fronts.close()

    def _end(self) -> None:
        """Tell the others that this is the end, and wait until they have gone, one after the other."""
        if not self._ring.after:
            return
        self._ring.after.send(End(self._ready.epoch))
        deadline = time.monotonic() + END_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            try:
                if isinstance(self._inbox.get(timeout=left), _Broken):
                    return
            except queue.Empty:
                break
        raise HopError(f"the other stages have not ended within {END_SECONDS:.0f} s")

    def _loop(self, fronts: Fronts) -> None:
        tick = time.monotonic()
        while True:
            self._departure.waits()
            now = time.monotonic()
            self._answer(self.scheduler.expire(now))
            self._check_silence(now)
            if now >= tick:
                stats = self._meter.stats(self._ready.epoch, self.scheduler, now)
                fronts.broadcast(stats)
                self._report(stats)
                tick = now + TICK_SECONDS
            fronts.send(self._answers)
            self._answers.clear()
            batch = self.scheduler.next_batch()
            if batch:
                self._send(batch)
            if not self._take(0.0 if batch else self._next(tick)):
                return

    def _next(self, tick: float) -> float:
        """Seconds until something is due."""
        deadline = self.scheduler.next_deadline()
        return max(0.0, (tick if deadline is None else min(tick, deadline)) - time.monotonic())

    def _take(self, seconds: float) -> bool:
        """Handle what has come by now, waiting at most ``seconds`` for the first; False once asked to stop."""
        try:
            for place in range(max(1, self._inbox.qsize())):
                message = self._inbox.get(timeout=seconds) if seconds and not place else self._inbox.get_nowait()
                if message is None:
                    return False
                self._handle(message)
        except queue.Empty:
            pass
        return True

    def _handle(self, message: _Message) -> None:
        if isinstance(message, _Broken):
            raise message.error
        if isinstance(message, Passed | End):
            raise HopError("the last stage sent what is for others; allowed: tokens")
        if isinstance(message, Returned):
            if message.epoch == self._ready.epoch:
                self._complete(message.number, message.drawn, message.busy)
        elif isinstance(message, Left):
            self._leave(message.connection)
        elif isinstance(message.message, Cancel):
            self._answer(self.scheduler.end((message.connection, message.message.request_id), "cancelled"))
        else:
            self._submit(message.connection, message.message)

    def _submit(self, connection: int, submit: Submit) -> None:
        key = (connection, submit.request_id)
        if problem := self._problem(key, submit):
            self._answers.append((connection, Refused(request_id=submit.request_id, reason="invalid", message=problem)))
            return
        now = time.monotonic()
        request = Request(
            key=key,
            prompt=tuple(submit.prompt_token_ids),
            max_tokens=submit.max_tokens,
            sampling=submit.sampling,
            deadline=now + submit.deadline_seconds,
            emitted=tuple(submit.emitted_token_ids),
            stop_tokens=frozenset(submit.stop_token_ids),
            priority=submit.priority,
        )
        if submit.stop and self._decode:
            request = replace(request, ends=StopWatch(self._decode, submit.stop))
        answer = self.scheduler.submit(request)
        if not isinstance(answer, Refusal):
            self._answer(answer)
            return
        wait = self._meter.seconds_for(request.most_tokens) if answer.reason == "overloaded" else None
        refused = Refused(
            request_id=submit.request_id, reason=answer.reason, message=answer.message, retry_after_seconds=wait
        )
        self._answers.append((connection, refused))

    def _problem(self, key: tuple[int, str], submit: Submit) -> str:
        if key in self.scheduler:
            return f"requestId: {submit.request_id!r} is in use on this connection; allowed: a new one"
        largest = max(submit.prompt_token_ids + submit.emitted_token_ids)
        if largest >= self._ready.vocabulary:
            return f"promptTokenIds: the model knows no token {largest}; allowed: 0 to {self._ready.vocabulary - 1}"
        if submit.stop and not self._decode:
            return "stop: this model has no tokenizer to find texts with; allowed: stopTokenIds"
        return ""

    def _send(self, batch: Batch) -> None:
        self._departure.computes()
        began = time.monotonic()
        result = self._layers.run(batch)
        drawn = () if self._ring.after else drawn_behind(batch, result)
        now = time.monotonic()
        self._busy += now - began
        self._meter.sent(batch)
        if not self._ring.after:
            self._complete(batch.number, drawn, (self._busy,))
            return
        self._left_at[batch.number] = now
        self._ring.after.send(Passed(self._ready.epoch, batch, result, (self._busy,)))

    def _complete(self, number: int, drawn: tuple[Drawn, ...], busy: tuple[float, ...]) -> None:
        self._left_at.pop(number, None)
        self._meter.returned(len(drawn), busy)
        self._answer(self.scheduler.complete(number, drawn))

    def _leave(self, connection: int) -> None:
        """Nobody is left to answer."""
        for key in self.scheduler.unfinished():
            if key[0] == connection:
                self.scheduler.end(key, "cancelled")

    def _answer(self, events: Iterable[Event]) -> None:
        for event in events:
            connection, request_id = event.key
            if isinstance(event, Ended):
                if event.reason in ("stop", "length"):
                    self._meter.finished()
                answer: Token | Finished = Finished(request_id=request_id, reason=event.reason, message=event.message)
            else:
                answer = self._token(request_id, event.position, event.drawn)
            self._answers.append((connection, answer))

    def _token(self, request_id: str, position: int, drawn: Drawn) -> Token:
        assert drawn.token is not None
        return Token(
            request_id=request_id,
            position=position,
            token_id=drawn.token,
            epoch=self._ready.epoch,
            logprob=drawn.logprob,
            top_logprobs=[Alternative(token_id=token, logprob=logprob) for token, logprob in drawn.alternatives],
        )

    def _check_silence(self, now: float) -> None:
        if self._left_at and now - min(self._left_at.values()) > SILENCE_SECONDS:
            raise HopError(f"a batch has not come back for {SILENCE_SECONDS:.0f} s")
