"""A Serve or Batch job as one of its stages: meet the others, agree on the cut, load, serve; again after each loss."""

import gc
import socket
import time
from collections.abc import Callable
from pathlib import Path

import structlog
import torch

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.front.batch import FileAnswering, FileThread
from pipelinejob_worker.front.records import Answers, Requests
from pipelinejob_worker.link import Event, Joined, Reached
from pipelinejob_worker.models import Chunk, model_of
from pipelinejob_worker.pipeline.partition import describe
from pipelinejob_worker.protocol import ENGINE_PORT, RING_PORT, Progress, Serving, StageTiming, WorkerConfig
from pipelinejob_worker.serve.cut import Held, Offer, agree, cut
from pipelinejob_worker.serve.engine import Leader
from pipelinejob_worker.serve.ring import Circle, Departure, Member, form
from pipelinejob_worker.serve.stage import Stage
from pipelinejob_worker.serve.tokenizer import tokenizer_of
from pipelinejob_worker.serve.weights import Trained
from pipelinejob_worker.serve.wire import Stats
from pipelinejob_worker.serve.worker import LOAD_SECONDS, Service, serve

log = structlog.get_logger()

FORM_SECONDS = 60.0
"""How long a stage waits for its neighbours to come."""


class ServeJob:
    """What a worker keeps from one incarnation of the group to the next: above all its loaded layers."""

    def __init__(
        self,
        config: WorkerConfig,
        device: torch.device,
        source: Path,
        *,
        host: str = "",
        ring_port: int = RING_PORT,
        engine_port: int = ENGINE_PORT,
    ) -> None:
        """Read what can be read without the others, and listen for the stage before.

        ``source``: directory of the checkpoints of ``config.source``. ``host``: address to listen at; empty: all.
        Raises ConfigurationError, OSError when the port is taken.
        """
        self._config = config
        self._device = device
        self._model = model_of(config.model)
        self._trained = self._checkpoints(source)
        self._tokenizer = tokenizer_of(config, self._model)
        self._engine_address = (host, engine_port)
        self._listener = _listen(host, ring_port)
        self._held: Held | None = None
        self._layers: tuple[range, Stage] | None = None
        self._leader: Leader | None = None
        self._file: FileThread | None = None
        self._answers: Answers | None = None
        self._requests = 0

    def close(self) -> None:
        """End what is left; layers need no end."""
        self._listener.close()
        if self._file:
            self._file.stop()
        if self._answers:
            self._answers.close()

    def take_part(self, member: Member, departure: Departure, tell: Callable[[Event], None]) -> None:
        """Serve in one incarnation of the group until its end, which only a Batch job has.

        ``departure``: the order to leave before that. ``tell`` gets Joined and Reached. Raises HopError when a stage is
        lost or this one was told to leave, and ConfigurationError; the layers stay loaded.
        """
        if member.stage == 0 and self._config.batch and not self._file:
            self._begin_file()
        circle = form(member, self._listener, repr(self._service)[:4096], time.monotonic() + FORM_SECONDS, departure)
        try:
            held = self._load(circle, departure)
            log.info("joined the ring", stages=member.stages, layers=describe(held.cut[member.stage]), step=held.step)
            self._serve(circle, held, departure, tell)
        finally:
            self._leader = None
            circle.close()
        if self._file and self._file.failure:
            raise self._file.failure

    @property
    def _service(self) -> Service:
        engine, source = self._config.engine, self._config.source
        return Service(
            model=self._model.fingerprint + (f" of {source.job}, seed {source.seed}" if source else ""),
            vocabulary=self._model.vocabulary,
            context=self._model.context,
            width=self._model.width,
            batch_tokens=engine.batch_tokens,
            accepted_tokens=engine.max_tokens_in_flight,
            deterministic=engine.deterministic,
        )

    def _checkpoints(self, directory: Path) -> Trained | None:
        source = self._config.source
        if source is None:
            return None
        return Trained(directory, f"{self._model.fingerprint} seed={source.seed}", source.job)

    def _steps(self) -> tuple[int, ...]:
        """The checkpoints that can be loaded; who has loaded one can do without them."""
        if self._trained is None:
            return ()
        try:
            return tuple(self._trained.steps())
        except ConfigurationError as error:
            if self._held is None:
                raise
            log.warning("no checkpoint to be seen", error=str(error))
            return ()

    def _load(self, circle: Circle, departure: Departure) -> Held:
        """Agree with the others on what to load, and load what is not loaded yet."""

        def exchange(note: dict[str, object]) -> list[dict[str, object]]:
            departure.waits()
            heard = circle.exchange(note, LOAD_SECONDS)
            departure.computes()
            return heard

        member, model, source = circle.member, self._model, self._config.source
        offer = Offer(held=self._held, steps=self._steps())
        offers = [Offer.model_validate(note) for note in exchange(offer.model_dump())]
        kept, step = agree(offers, source.step if source else 0)
        if kept is None:
            ranges = cut(model, self._config.partition, member.stages, self._device, exchange)
            starts = tuple(part.start for part in ranges)
            kept = Held(layers=len(model.names), starts=starts, step=step)
        held = kept.model_copy(update={"step": step})
        mine = held.cut[member.stage]
        if self._layers is None or self._held is None or (mine, step) != (self._layers[0], self._held.step):
            self._layers = self._held = None
            gc.collect()  # before there are others, not when there is no room for them
            self._layers = (mine, self._built(mine, step))
        self._held = held
        return held

    def _built(self, indices: range, step: int) -> Stage:
        engine, trained, began = self._config.engine, self._trained, time.monotonic()

        def fill(chunk: Chunk) -> None:
            if trained:
                trained.fill(self._model, chunk, step)

        cache_bytes = engine.key_value_cache_mib << 20
        stage = Stage(self._model, indices, self._device, cache_bytes, deterministic=engine.deterministic, fill=fill)
        log.info("layers loaded", layers=describe(indices), seconds=round(time.monotonic() - began, 2))
        return stage

    def _serve(self, circle: Circle, held: Held, departure: Departure, tell: Callable[[Event], None]) -> None:
        assert self._layers
        _, stage = self._layers

        def started(leader: Leader | None, _port: int) -> None:
            self._leader = leader
            tell(Joined(layers=describe(held.cut[circle.member.stage])))
            tell(Reached(progress=self._progress(held, None)))
            self._stop_at_the_end()

        tokenizer = self._tokenizer
        serve(
            self._service,
            stage,
            stage.blocks,
            circle,
            front=self._engine_address,
            decode=tokenizer.decode if tokenizer else None,
            started=started,
            report=lambda stats: tell(Reached(progress=self._progress(held, stats))),
            departure=departure,
        )
        tell(Reached(progress=self._progress(held, None)))

    def _progress(self, held: Held, stats: Stats | None) -> Progress:
        """What this stage knows; without statistics only which layers are where, and how much of a file is answered."""
        answers = self._answers
        known = Progress(step=answers.count if answers else 0, total_steps=self._requests, serving=Serving())
        busy = stats.stage_busy_percent if stats and stats.stage_busy_percent else [0.0] * len(held.starts)
        stages = tuple(
            StageTiming(stage=number, busy_percent=round(percent), layers=describe(part))
            for number, (percent, part) in enumerate(zip(busy, held.cut, strict=True))
        )
        if stats is None:
            return known.model_copy(update={"stages": stages})
        serving = Serving(
            requests_per_second=stats.requests_per_second,
            prompt_tokens_per_second=stats.prompt_tokens_per_second,
            queued=stats.queued,
            running=stats.running,
            cache_percent=100 * stats.cache_blocks_used / max(1, stats.cache_blocks),
            preemptions=stats.preemptions,
        )
        return known.model_copy(
            update={
                "stages": stages,
                "tokens_per_second": stats.tokens_per_second,
                "bubble_percent": stats.bubble_percent,
                "serving": serving,
            }
        )

    def _begin_file(self) -> None:
        batch = self._config.batch
        assert batch
        if self._tokenizer is None:
            raise ConfigurationError("spec.batch: this model has no tokenizer; allowed: a model with one")
        requests = Requests.of(Path(batch.input))
        self._requests = requests.count
        self._answers = Answers(Path(batch.output), requests)
        log.info("answering a file", requests=requests.count, answered=self._answers.count)
        answering = FileAnswering(
            requests, self._answers, self._tokenizer, self._config.job, batch.max_tokens_in_flight
        )
        engine = (self._engine_address[0] or "127.0.0.1", self._engine_address[1])
        self._file = FileThread(answering, engine, self._stop_at_the_end)

    def _stop_at_the_end(self) -> None:
        """Stop once the file is answered; called by its thread then, and by the main one when a leader has begun."""
        leader, file = self._leader, self._file
        if leader and file and (file.done or file.failure):
            leader.stop()


def _listen(host: str, port: int) -> socket.socket:
    if not host and socket.has_dualstack_ipv6():
        return socket.create_server((host, port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server((host, port))
