"""From accepted choices to the bytes of an answer, whole or as a stream of events."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass, field

from aiohttp import web

from pipelinejob_worker.front.account import ACCOUNT
from pipelinejob_worker.front.dispatcher import Dispatcher
from pipelinejob_worker.front.generation import Generation
from pipelinejob_worker.front.metrics import Metrics
from pipelinejob_worker.front.planning import Choice
from pipelinejob_worker.front.refusals import ApiError
from pipelinejob_worker.front.settings import Limits
from pipelinejob_worker.front.shapes import Envelope, Object, usage
from pipelinejob_worker.front.tokenizer import Tokenizer
from pipelinejob_worker.front.transcript import Piece, Transcript, joined

_STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
"""The last one keeps nginx from holding events back."""


@dataclass
class _Work:
    """A choice under way. Times are of the monotonic clock, 0 until they are known."""

    generation: Generation
    transcript: Transcript
    echo: str
    first_token: float = 0.0
    last_token: float = 0.0


@dataclass
class Job:
    """One request that is being answered. ``arrival``: time of the monotonic clock."""

    envelope: Envelope
    arrival: float
    changed: asyncio.Event
    works: list[_Work] = field(default_factory=list)

    def usage(self) -> Object:
        """Return the numbers of tokens so far; a prompt counts once, however many choices it has."""
        prompts = {id(work.generation.prompt): len(work.generation.prompt) for work in self.works}
        return usage(sum(prompts.values()), sum(work.transcript.tokens for work in self.works))


class Answering:
    """Answers requests with what the dispatcher's engines generate."""

    def __init__(self, dispatcher: Dispatcher, tokenizer: Tokenizer, metrics: Metrics, limits: Limits) -> None:
        self._dispatcher = dispatcher
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._limits = limits

    def begin(self, envelope: Envelope, choices: list[Choice], arrival: float) -> Job:
        """Accept the choices. Raises ApiError when that is too much at present. The caller calls ``end``."""
        now = asyncio.get_running_loop().time()
        job = Job(envelope, arrival, asyncio.Event())
        for index, choice in enumerate(choices):
            generation = Generation(
                name=f"{envelope.identity}-{index}",
                prompt=choice.prompt,
                sampling=choice.sampling,
                max_tokens=choice.max_tokens,
                deadline=now + self._limits.request_seconds,
                changed=job.changed,
                stop=choice.stop,
                stop_token_ids=choice.stop_token_ids,
            )
            if choice.max_tokens == 0:
                generation.end("length")
            transcript = Transcript(generation, self._tokenizer, offset=len(choice.echo))
            job.works.append(_Work(generation, transcript, choice.echo))
        self._dispatcher.accept([work.generation for work in job.works if not work.generation.ended], now)
        return job

    def end(self, job: Job) -> None:
        """Drop what is still under way, as nobody waits for it any more, and count."""
        for work in job.works:
            self._dispatcher.release(work.generation)
            tokens = work.transcript.tokens
            self._metrics.prompt_tokens.inc(len(work.generation.prompt))
            self._metrics.generation_tokens.inc(tokens)
            self._metrics.request_prompt_tokens.observe(len(work.generation.prompt))
            self._metrics.request_generation_tokens.observe(tokens)
            if tokens > 1:
                self._metrics.time_per_output_token.observe((work.last_token - work.first_token) / (tokens - 1))
        if any(work.transcript.finished for work in job.works):
            self._metrics.request_latency.observe(time.monotonic() - job.arrival)

    async def answer(self, job: Job) -> Object:
        """Return the answer with all choices, once it is whole. Raises ApiError."""
        pieces: list[list[Piece]] = [[] for _ in job.works]
        async for index, piece in self._pieces(job):
            pieces[index].append(piece)
        shape = job.envelope.shape
        choices = [
            shape.whole(index, work.echo, joined(found))
            for index, (work, found) in enumerate(zip(job.works, pieces, strict=True))
        ]
        return job.envelope.whole(choices, job.usage())

    async def whole(self, job: Job, request: web.Request) -> web.StreamResponse:
        """Answer with all choices at once. Raises ApiError, and ConnectionError when the client is gone."""
        response = web.json_response(body=_json(await self.answer(job)))
        await self._read_by_client(request, response.prepare(request))
        await self._read_by_client(request, response.write_eof())
        return response

    async def stream(self, job: Job, request: web.Request, with_usage: bool) -> web.StreamResponse:
        """Answer with an event for each piece. Raises as ``whole`` before the first; later errors are events."""
        response = web.StreamResponse(headers=_STREAM_HEADERS)
        try:
            async for index, piece in self._pieces(job):
                if not response.prepared:
                    await self._open(job, request, response, with_usage)
                delta = job.envelope.shape.delta(index, piece)
                await self._send(request, response, job.envelope.chunk([delta], None, with_usage))
        except ApiError as error:
            if not response.prepared:
                raise
            request[ACCOUNT].outcome = error.code
            await self._send(request, response, error.body())
        else:
            if with_usage:
                await self._send(request, response, job.envelope.chunk([], job.usage(), with_usage))
            await self._read_by_client(request, response.write(b"data: [DONE]\n\n"))
        await self._read_by_client(request, response.write_eof())
        return response

    async def _open(self, job: Job, request: web.Request, response: web.StreamResponse, with_usage: bool) -> None:
        await self._read_by_client(request, response.prepare(request))
        for index, work in enumerate(job.works):
            if (opening := job.envelope.shape.opening(index, work.echo)) is not None:
                await self._send(request, response, job.envelope.chunk([opening], None, with_usage))

    async def _pieces(self, job: Job) -> AsyncIterator[tuple[int, Piece]]:
        """Yield the pieces of all choices as they come; those that came while the client did not read, as one."""
        unfinished = dict(enumerate(job.works))
        while unfinished:
            await job.changed.wait()
            job.changed.clear()
            for index, work in list(unfinished.items()):
                piece = self._take(job, work)
                if work.transcript.finished:
                    del unfinished[index]
                    self._dispatcher.release(work.generation)
                if work.generation.failure:
                    job.changed.set()  # it is raised next time, behind all that came before it
                if piece:
                    yield index, piece

    def _take(self, job: Job, work: _Work) -> Piece:
        before = work.transcript.tokens
        piece = work.transcript.take()
        if work.transcript.tokens > before:
            work.last_token = time.monotonic()
            if not work.first_token:
                work.first_token = work.last_token
                self._metrics.time_to_first_token.observe(work.first_token - job.arrival)
        return piece

    async def _send(self, request: web.Request, response: web.StreamResponse, event: Object) -> None:
        await self._read_by_client(request, response.write(b"data: " + _json(event) + b"\n\n"))

    async def _read_by_client(self, request: web.Request, writing: Awaitable[object]) -> None:
        """Wait until the client has taken what is written; leave one that does not read."""
        try:
            async with asyncio.timeout(self._limits.stall_seconds):
                await writing
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionResetError("the client does not read") from None


def _json(value: Object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
