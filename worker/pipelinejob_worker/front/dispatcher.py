"""Which engine works for which choice, through deaths and returns of engines. No I/O; time is an argument.

Engines are known by the index of their pipeline. A choice is with an engine, or waits for one, or has ended. When an
engine is lost, its choices go to another one, or wait; either way with the tokens they already have.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from pipelinejob_worker.front.generation import Generation
from pipelinejob_worker.front.refusals import failed, invalid, out_of_time, overloaded, too_long, unavailable
from pipelinejob_worker.front.routing import choose
from pipelinejob_worker.front.settings import Limits
from pipelinejob_worker.serve.wire import Cancel, Finished, Ready, Refused, Stats, Submit, Token

Send = Callable[[Submit | Cancel], None]

_BUSY_RETRY_SECONDS = 1.0
"""When to ask again an engine that was too busy for a choice that is already under way."""

_MOST_FRUITLESS = 16
"""Engines that a choice may lose in a row without a token: it may be what kills them, and must not for ever."""


class ProtocolError(Exception):
    """An engine said what it may not say; its connection is to be closed."""


@dataclass
class Engine:
    """A connected engine whose group is formed. ``others``: unfinished requests of other fronts."""

    ready: Ready
    send: Send
    work: dict[str, Generation] = field(default_factory=dict)
    """Unfinished choices by the id of their attempt."""
    others: int = 0
    stats: Stats | None = None


class Dispatcher:
    """Holds every accepted choice until its end. For one event loop only."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.engines: dict[int, Engine] = {}
        self._newest_epoch: dict[int, int] = {}
        self._place: dict[Generation, int | None] = {}
        """Pipeline of every choice that has not ended; None while it waits."""
        self._waiting: dict[Generation, float] = {}
        """Choices without an engine, and the time from which one may be asked again."""
        self.bounds: Ready | None = None
        """What requests the engines take; None until the first one has been ready."""
        self.stale_tokens = 0
        self.resubmissions = 0

    @property
    def waiting(self) -> int:
        """Accepted choices without an engine."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Accepted choices with an engine."""
        return len(self._place) - len(self._waiting)

    def accept(self, generations: list[Generation], now: float) -> None:
        """Take responsibility for the choices of a request, all or none.

        Raises ApiError: 429 when that is too much at present, 503 when it is and no engine is there.
        """
        count, held = len(self._place), sum(one.held_tokens for one in self._place)
        more = sum(one.held_tokens for one in generations)
        if count + len(generations) > self._limits.requests or held + more > self._limits.held_tokens:
            if not self.engines:
                raise unavailable("The model is recovering, and the queue is full; try again later.")
            raise overloaded(f"{count} choices with {held} tokens are waiting or running; try again later.")
        for generation in generations:
            generation.waiting_since = now
            self._offer(generation, now)

    def release(self, generation: Generation) -> None:
        """Nobody waits for the choice any more. Ended ones are left alone."""
        pipeline = self._place.get(generation)
        if pipeline is not None:
            self.engines[pipeline].send(Cancel(request_id=generation.request_id))
        self._forget(generation)

    def give_up(self) -> None:
        """End all that is under way, as this front is about to stop; clients are to ask another one."""
        for generation in list(self._place):
            self.release(generation)
            generation.fail(unavailable("This server stops; ask again.", retry_after=1))

    def ready(self, pipeline: int, ready: Ready, send: Send, now: float) -> None:
        """An engine can take requests; ``send`` hands it messages and never blocks.

        Raises ProtocolError when a newer group of that pipeline has been seen.
        """
        self.lost(pipeline, now)
        if ready.epoch < (newest := self._newest_epoch.get(pipeline, 0)):
            raise ProtocolError(f"epoch {ready.epoch} has been replaced by {newest}")
        self._newest_epoch[pipeline] = ready.epoch
        self.engines[pipeline] = Engine(ready, send)
        self.bounds = ready
        self.tick(now)

    def lost(self, pipeline: int, now: float) -> None:
        """The connection to an engine is gone, and with it all that the engine was doing for this front."""
        engine = self.engines.pop(pipeline, None)
        for generation in engine.work.values() if engine else ():
            generation.fruitless += 1
            if generation.end_if_complete():
                self._forget(generation)
            elif generation.fruitless >= _MOST_FRUITLESS:
                self._forget(generation)
                generation.fail(failed(f"{generation.fruitless} engines were lost in a row.", retry=False))
            else:
                generation.orphaned, generation.waiting_since = True, now
                self._offer(generation, now)

    def heard(self, pipeline: int, message: Token | Finished | Refused | Stats, now: float) -> None:
        """Obey an engine. What it says of choices that it does not have any more is dropped.

        Raises ProtocolError.
        """
        engine = self.engines[pipeline]
        if isinstance(message, Stats):
            engine.stats = message
            engine.others = max(0, message.queued + message.running - len(engine.work))
            return
        if isinstance(message, Token) and self._is_stale(engine, message):
            return
        generation = engine.work.get(message.request_id)
        if generation is None:
            return
        if isinstance(message, Token):
            _extend(generation, message)
            return
        del engine.work[message.request_id]
        if isinstance(message, Finished):
            self._forget(generation)
            self._finish(generation, message)
        else:
            self._refuse(generation, pipeline, message, now)

    def tick(self, now: float) -> None:
        """Offer waiting choices to engines, those under way first; give up those whose time is over."""
        for generation in [one for one in self._place if now >= one.deadline]:
            self.release(generation)
            generation.fail(out_of_time(self._limits.request_seconds))
        for generation, not_before in sorted(self._waiting.items(), key=lambda item: not item[0].orphaned):
            if now >= generation.waiting_since + self._limits.recovery_seconds:
                self._forget(generation)
                generation.fail(unavailable(f"The model did not recover within {self._limits.recovery_seconds:g} s."))
            elif self.engines and now >= not_before:
                generation.refused_by.clear()
                self._offer(generation, now)

    def _offer(self, generation: Generation, now: float, retry_after: float = 0.0) -> None:
        """Submit the choice to the best engine that has not refused it; without any, let it wait."""
        loads = {
            pipeline: len(engine.work) + engine.others
            for pipeline, engine in self.engines.items()
            if pipeline not in generation.refused_by
        }
        if not loads:
            self._place[generation], self._waiting[generation] = None, now + retry_after
            return
        pipeline = choose(generation.prompt, loads)
        self._waiting.pop(generation, None)
        self._place[generation] = pipeline
        self.resubmissions += generation.orphaned
        generation.attempt += 1
        engine = self.engines[pipeline]
        engine.work[generation.request_id] = generation
        engine.send(generation.submission(now))

    def _forget(self, generation: Generation) -> None:
        self._waiting.pop(generation, None)
        pipeline = self._place.pop(generation, None)
        if pipeline is not None and pipeline in self.engines:
            self.engines[pipeline].work.pop(generation.request_id, None)

    def _is_stale(self, engine: Engine, token: Token) -> bool:
        if token.epoch > engine.ready.epoch:
            raise ProtocolError(f"a token of epoch {token.epoch}, but the group is that of {engine.ready.epoch}")
        stale = token.epoch < engine.ready.epoch
        self.stale_tokens += stale
        return stale

    def _finish(self, generation: Generation, message: Finished) -> None:
        if message.reason in ("stop", "length"):
            generation.end(message.reason)
        elif message.reason == "deadline":
            generation.fail(out_of_time(self._limits.request_seconds))
        else:
            generation.fail(failed(f"The engine gave the request up: {message.message or message.reason}"))

    def _refuse(self, generation: Generation, pipeline: int, message: Refused, now: float) -> None:
        """Try the others when one is too busy; a choice that an engine had accepted before may wait for that."""
        if message.reason == "overloaded":
            generation.refused_by.add(pipeline)
            retry_after = message.retry_after_seconds or _BUSY_RETRY_SECONDS
            if generation.refused_by >= self.engines.keys() and not generation.orphaned:
                self._forget(generation)
                generation.fail(overloaded(message.message, retry_after))
            else:
                self._offer(generation, now, retry_after)
            return
        self._forget(generation)
        too_large = message.reason == "too_large"
        generation.fail(too_long("prompt", message.message) if too_large else invalid("prompt", message.message))


def _extend(generation: Generation, token: Token) -> None:
    if token.position > generation.next_position:
        raise ProtocolError(f"position {token.position} of a request came where {generation.next_position} is next")
    if token.position == generation.next_position:
        generation.emit(token)
