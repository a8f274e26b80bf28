"""Answering a file of requests: what a front does, with lines of files in place of HTTP."""

import asyncio
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from pipelinejob_worker.front import engines
from pipelinejob_worker.front.answering import Answering
from pipelinejob_worker.front.chat import ChatTemplate
from pipelinejob_worker.front.dispatcher import Dispatcher
from pipelinejob_worker.front.metrics import Metrics
from pipelinejob_worker.front.planning import Choice, Planner
from pipelinejob_worker.front.records import Answers, Requests, identity
from pipelinejob_worker.front.refusals import ApiError, invalid, of_validation
from pipelinejob_worker.front.schema import ChatRequest, CompletionRequest
from pipelinejob_worker.front.settings import Limits
from pipelinejob_worker.front.shapes import ChatShape, CompletionShape, Envelope, Object, Shape
from pipelinejob_worker.front.tokenizer import Tokenizer
from pipelinejob_worker.serve.wire import MAX_SECONDS, MAX_TOKENS, Ready

log = structlog.get_logger()

SYNC_SECONDS = 1.0
"""How much of the answers a machine's sudden end may cost; they are computed again."""

REQUESTS_AT_A_TIME = 4096
_AGAIN_STATUSES = (429, 503)
_AGAIN_SECONDS = 1.0

LIMITS = Limits(
    prompt_tokens=MAX_TOKENS,
    output_tokens=MAX_TOKENS,
    choices=64,
    requests=100_000,
    held_tokens=1 << 30,
    request_seconds=MAX_SECONDS,
    recovery_seconds=3600,
)
"""Of what a front accepts and waits: nobody waits for single answers here, and a file is not an attack."""


class Record(BaseModel):
    """A line of the input: a request as OpenAI's Batch API takes it, or the body of one alone."""

    model_config = ConfigDict(strict=True)

    custom_id: str | None = Field(None, max_length=512)
    method: str = "POST"
    url: str = ""
    body: dict[str, JsonValue]

    @classmethod
    def of(cls, line: bytes) -> "Record":
        """Read a line. Raises ValidationError, ValueError."""
        value = json.loads(line)
        if isinstance(value, dict) and "body" not in value:
            custom_id = value.pop("custom_id", None)
            value = {"custom_id": custom_id, "body": value}
        return cls.model_validate(value)

    @property
    def chat(self) -> bool:
        """Whether it is for ``/v1/chat/completions``; raises ApiError where it is for neither."""
        if self.method != "POST" or self.url not in ("", "/v1/completions", "/v1/chat/completions"):
            raise invalid(
                "url", f"{self.method} {self.url[:100]} is not available; POST /v1/completions or /v1/chat/completions."
            )
        return self.url == "/v1/chat/completions" if self.url else "messages" in self.body


@dataclass(frozen=True)
class _Planned:
    """A request that has been understood."""

    number: int
    custom_id: str | None
    envelope: Envelope
    choices: list[Choice]

    @property
    def tokens(self) -> int:
        """Most tokens that an engine holds for it."""
        return sum(len(choice.prompt) + choice.max_tokens for choice in self.choices)


class FileAnswering:
    """Answers the requests of a file by one engine. Knows nothing of where the file is: ``records`` does."""

    def __init__(
        self, requests: Requests, answers: Answers, tokenizer: Tokenizer, model: str, tokens_at_a_time: int
    ) -> None:
        """``tokens_at_a_time``: what the engine accepts."""
        self._requests = requests
        self._answers = answers
        self._model = model
        self._tokens_at_a_time = tokens_at_a_time
        self._dispatcher = Dispatcher(LIMITS)
        source = tokenizer.chat_template
        template = None if source is None else ChatTemplate(source, tokenizer.special_tokens)
        self._planner = Planner(tokenizer, template, LIMITS)
        self._answering = Answering(self._dispatcher, tokenizer, Metrics(self._dispatcher), LIMITS)
        self._running: dict[asyncio.Task[None], int] = {}

    async def run(self, engine: engines.Address) -> None:
        """Answer all that has no answer yet, and complete the output. Raises OSError when that cannot be written."""
        if self._answers.complete:
            return
        try:
            async with asyncio.TaskGroup() as group:
                helpers = [
                    group.create_task(engines.follow(engine, self._dispatcher, LIMITS)),
                    group.create_task(self._sync()),
                ]
                for number, line in self._requests:
                    if not self._answers.answered[number]:
                        await self._begin(number, line, group)
                while self._running:
                    await self._some_end()
                for helper in helpers:
                    helper.cancel()
        except* OSError as failures:
            raise failures.exceptions[0] from failures
        await asyncio.to_thread(self._answers.finish)

    async def _sync(self) -> None:
        while True:
            await asyncio.sleep(SYNC_SECONDS)
            await asyncio.to_thread(self._answers.sync)

    async def _begin(self, number: int, line: bytes | None, group: asyncio.TaskGroup) -> None:
        """Begin to answer a request, once there is room for it."""
        while (bounds := self._dispatcher.bounds) is None:  # noqa: ASYNC110 - the dispatcher has no event for this
            await asyncio.sleep(0.05)
        custom_id = None
        try:
            record = _parsed(line)
            custom_id = record.custom_id
            planned = self._plan(number, record, bounds)
        except ApiError as error:
            self._answers.append(number, _answer(custom_id, error.status, identity(number), error.body()))
            return
        while self._running and (
            sum(self._running.values()) + planned.tokens > self._tokens_at_a_time
            or len(self._running) >= REQUESTS_AT_A_TIME
        ):
            await self._some_end()
        self._running[group.create_task(self._answer(planned))] = planned.tokens

    async def _some_end(self) -> None:
        ended, _ = await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
        for task in ended:
            del self._running[task]

    def _plan(self, number: int, record: Record, bounds: Ready) -> _Planned:
        """Understand a request. Where it has no seed its line number is one, so that a file has the same answers."""
        kind = ChatRequest if record.chat else CompletionRequest
        try:
            body = kind.model_validate_json(json.dumps({"model": self._model, "seed": number, **record.body}))
        except ValidationError as error:
            raise of_validation(error) from error
        if body.model != self._model:
            raise ApiError(
                404,
                f"The model '{body.model[:100]}' does not exist; this job has '{self._model}'.",
                param="model",
                code="model_not_found",
            )
        if body.stream:
            raise invalid("stream", "A file gets whole answers; leave it out.")
        shape: Shape
        if isinstance(body, ChatRequest):
            choices, shape = self._planner.chat(body, bounds), ChatShape(bool(body.logprobs))
        else:
            choices, shape = self._planner.completion(body, bounds), CompletionShape(body.logprobs is not None)
        return _Planned(number, record.custom_id, Envelope(shape, f"{number}", self._model, int(time.time())), choices)

    async def _answer(self, planned: _Planned) -> None:
        status, body = await self._answered(planned)
        self._answers.append(planned.number, _answer(planned.custom_id, status, identity(planned.number), body))

    async def _answered(self, planned: _Planned) -> tuple[int, Object]:
        """Return status and body; what only fails for the moment is asked again, however long it takes."""
        while True:
            try:
                job = self._answering.begin(planned.envelope, planned.choices, time.monotonic())
                try:
                    return 200, await self._answering.answer(job)
                finally:
                    self._answering.end(job)
            except ApiError as error:
                if error.status not in _AGAIN_STATUSES:
                    return error.status, error.body()
                log.info("asking again", request=planned.number, error=str(error))
                await asyncio.sleep(_AGAIN_SECONDS)


def _parsed(line: bytes | None) -> Record:
    if line is None:
        raise ApiError(413, "The line is too long; send a shorter request.", code="body_too_large")
    try:
        return Record.of(line)
    except ValidationError as error:
        raise of_validation(error) from error
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The line is not JSON: {error}", code="invalid_json") from error


def _answer(custom_id: str | None, status: int, request_id: str, body: Object) -> dict[str, Any]:
    """Return a line of the output, as OpenAI's Batch API has it, without its id."""
    response = {"status_code": status, "request_id": request_id, "body": body}
    return {"custom_id": custom_id, "response": response, "error": None}


class FileThread:
    """Runs a FileAnswering in a thread, through all losses of its engine. ``ended`` is called there at the end."""

    def __init__(self, answering: FileAnswering, engine: engines.Address, ended: Callable[[], None]) -> None:
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(answering.run(engine))
        self._ended = ended
        self.done = False
        """Whether all is answered."""
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="file", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Leave the rest to a successor."""
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._task)
            self.done = True
        except asyncio.CancelledError:
            pass
        except BaseException as error:  # noqa: BLE001 - the main thread raises it
            self.failure = error
        self._ended()
