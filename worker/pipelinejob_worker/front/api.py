"""The routes of a front, and what holds for all of them: ids, tokens, limits, errors, logs."""

import asyncio
import hmac
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import ParamSpec, TypeVar

import structlog
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import ValidationError

from pipelinejob_worker.front.account import ACCOUNT, Account
from pipelinejob_worker.front.answering import Answering
from pipelinejob_worker.front.chat import ChatTemplate
from pipelinejob_worker.front.dispatcher import Dispatcher
from pipelinejob_worker.front.metrics import Metrics
from pipelinejob_worker.front.planning import Choice, Planner
from pipelinejob_worker.front.refusals import ApiError, failed, of_validation, overloaded, unavailable
from pipelinejob_worker.front.schema import ChatRequest, CompletionRequest, Request
from pipelinejob_worker.front.settings import Limits, Settings
from pipelinejob_worker.front.shapes import ChatShape, CompletionShape, Envelope, Object, Shape
from pipelinejob_worker.front.tokenizer import Tokenizer
from pipelinejob_worker.serve.wire import Ready

log = structlog.get_logger()

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Kind = TypeVar("Kind", bound=Request)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

REQUEST_ID = "X-Request-Id"
_USABLE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

_BODIES_BYTES = 256 << 20
"""Most bytes of all bodies that are being read or understood at a time."""

_SMALL_BODY_BYTES = 16 << 10
"""Larger bodies are parsed and tokenised in threads: nobody else waits for them, nor in a queue behind them."""

_CLIENT_GONE = 499
"""Status in logs and metrics of a request whose client has left; customary, as HTTP has none."""


class Api:
    """The API of one model. ``draining`` refuses new requests; ``idle`` is set while none is open."""

    def __init__(self, settings: Settings, limits: Limits, tokenizer: Tokenizer, dispatcher: Dispatcher) -> None:
        self._settings = settings
        self._limits = limits
        self._dispatcher = dispatcher
        self._metrics = Metrics(dispatcher)
        source = tokenizer.chat_template
        template = None if source is None else ChatTemplate(source, tokenizer.special_tokens)
        self._planner = Planner(tokenizer, template, limits)
        self._answering = Answering(dispatcher, tokenizer, self._metrics, limits)
        self._created = int(time.time())
        self._open = 0
        self._bodies_bytes = 0
        self.draining = False
        self.idle = asyncio.Event()
        self.idle.set()

    def application(self) -> web.Application:
        """Return the application that serves the routes."""
        application = web.Application(middlewares=[self._in_shape], client_max_size=self._limits.body_bytes)
        application.on_response_prepare.append(self._finish_headers)
        application.add_routes(
            [
                web.post("/v1/completions", self._guarded(self._completions)),
                web.post("/v1/chat/completions", self._guarded(self._chat)),
                web.get("/v1/models", self._guarded(self._models)),
                web.get("/v1/models/{model:.+}", self._guarded(self._one_model)),
                web.get("/healthz", self._health),
                web.get("/readyz", self._readiness),
                web.get("/metrics", self._show_metrics),
            ]
        )
        return application

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        def plan(body: CompletionRequest, bounds: Ready) -> tuple[list[Choice], Shape]:
            return self._planner.completion(body, bounds), CompletionShape(body.logprobs is not None)

        return await self._generate(request, CompletionRequest, plan)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        def plan(body: ChatRequest, bounds: Ready) -> tuple[list[Choice], Shape]:
            return self._planner.chat(body, bounds), ChatShape(bool(body.logprobs))

        return await self._generate(request, ChatRequest, plan)

    async def _generate(
        self,
        request: web.Request,
        kind: type[Kind],
        plan: Callable[[Kind, Ready], tuple[list[Choice], Shape]],
    ) -> web.StreamResponse:
        """Read, understand, accept and answer."""
        arrival = time.monotonic()
        async with self._body(request) as content:
            work = asyncio.to_thread if len(content) > _SMALL_BODY_BYTES else _at_once
            body = await work(_parsed, kind, content)
            self._check_model(body.model)
            if (bounds := self._dispatcher.bounds) is None:
                raise unavailable("The model is being loaded; try again later.")
            choices, shape = await work(plan, body, bounds)
        envelope = Envelope(shape, uuid.uuid4().hex, self._settings.model, int(time.time()))
        request[ACCOUNT].answer = envelope.identity
        job = self._answering.begin(envelope, choices, arrival)
        try:
            if body.stream:
                options = body.stream_options
                return await self._answering.stream(job, request, options is not None and options.include_usage)
            return await self._answering.whole(job, request)
        finally:
            self._answering.end(job)
            request[ACCOUNT].usage = job.usage()

    @asynccontextmanager
    async def _body(self, request: web.Request) -> AsyncIterator[bytes]:
        """Read the body; while it is in use it counts against what all bodies together may take. Raises ApiError."""
        limit, size = self._limits.body_bytes, request.content_length
        if request.content_type != "application/json":
            raise ApiError(415, "The body must be JSON; send Content-Type: application/json.")
        if size is None or "Content-Encoding" in request.headers:
            size = limit
        if size > limit:
            raise web.HTTPRequestEntityTooLarge(limit, size)
        if self._bodies_bytes + size > _BODIES_BYTES:
            raise overloaded("Too many large requests at a time; try again later.")
        self._bodies_bytes += size
        try:
            yield await self._read(request)
        finally:
            self._bodies_bytes -= size

    async def _read(self, request: web.Request) -> bytes:
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                return await request.read()
        except TimeoutError as error:
            raise ApiError(408, f"The body did not arrive within {self._limits.body_seconds:g} seconds.") from error

    def _check_model(self, model: str) -> None:
        if model != self._settings.model:
            raise ApiError(
                404,
                f"The model '{model[:100]}' does not exist; this server has '{self._settings.model}'.",
                param="model",
                code="model_not_found",
            )

    async def _models(self, _: web.Request) -> web.StreamResponse:
        return web.json_response({"object": "list", "data": [self._description()]})

    async def _one_model(self, request: web.Request) -> web.StreamResponse:
        self._check_model(request.match_info["model"])
        return web.json_response(self._description())

    def _description(self) -> Object:
        return {"id": self._settings.model, "object": "model", "created": self._created, "owned_by": "pipelinejob"}

    async def _health(self, _: web.Request) -> web.StreamResponse:
        return web.Response(text="ok\n")

    async def _readiness(self, _: web.Request) -> web.StreamResponse:
        """Ready once the model has been there; its recovery later is nothing that another front could help with."""
        loading = self._dispatcher.bounds is None
        state = "draining" if self.draining else "loading" if loading else "ready"
        return web.Response(text=f"{state}\n", status=200 if state == "ready" else 503)

    async def _show_metrics(self, _: web.Request) -> web.StreamResponse:
        return web.Response(body=self._metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    def _guarded(self, handler: Handler) -> Handler:
        """Let only those pass who may, and only as many as can be held."""

        async def guarded(request: web.Request) -> web.StreamResponse:
            self._authorise(request)
            if self.draining:
                raise unavailable("This server is about to stop; try again at once.", retry_after=1)
            if self._open >= self._limits.requests:
                raise overloaded(f"{self._open} requests are open; try again later.")
            self._open += 1
            self.idle.clear()
            try:
                return await handler(request)
            finally:
                self._open -= 1
                if not self._open:
                    self.idle.set()

        return guarded

    def _authorise(self, request: web.Request) -> None:
        """Compare in constant time. The file is read anew, so that a changed Secret needs no restart."""
        if self._settings.bearer_token_file is None:
            return
        expected = self._settings.bearer_token_file.read_bytes().strip()
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        matches = hmac.compare_digest(given.strip().encode(errors="replace"), expected)
        if not (expected and matches and scheme.lower() == "bearer"):
            raise ApiError(401, "Incorrect bearer token; send Authorization: Bearer <token>.", code="invalid_api_key")

    @web.middleware
    async def _in_shape(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Name the request, answer errors in OpenAI's shape, and write one line about what was asked of the API."""
        given = request.headers.get(REQUEST_ID, "")
        account = request[ACCOUNT] = Account(given if _USABLE_ID.fullmatch(given) else uuid.uuid4().hex)
        started = time.monotonic()
        status = _CLIENT_GONE
        with structlog.contextvars.bound_contextvars(request_id=account.request_id):
            try:
                response = await self._answered(request, handler)
                status = response.status
            finally:
                if request.path.startswith("/v1/"):
                    self._record(request, status, time.monotonic() - started)
        return response

    async def _answered(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except ApiError as error:
            found = error
        except web.HTTPRequestEntityTooLarge:
            found = ApiError(413, f"The body is larger than {self._limits.body_bytes} bytes.", code="body_too_large")
        except web.HTTPException as error:
            found = ApiError(error.status, f"{error.reason}: {request.method} {request.path[:200]}.")
            found.headers |= {name: value for name, value in error.headers.items() if name == "Allow"}
        except ConnectionError:
            raise
        except Exception:
            log.exception("the request failed")
            found = failed("The server failed; its log has the details under this request's id.")
        request[ACCOUNT].outcome = found.code
        return web.json_response(found.body(), status=found.status, headers=found.headers)

    async def _finish_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        if ACCOUNT in request:  # not where aiohttp itself refuses an Expect header
            response.headers[REQUEST_ID] = request[ACCOUNT].request_id
        if self.draining:
            response.force_close()
            response.headers["Connection"] = "close"

    def _record(self, request: web.Request, status: int, seconds: float) -> None:
        account, resource = request[ACCOUNT], request.match_info.route.resource
        self._metrics.requests.labels(resource.canonical if resource else "unknown", str(status)).inc()
        log.info(
            "request",
            method=request.method,
            path=request.path[:200],
            status=status,
            outcome=account.outcome or ("ok" if status < 400 else "client_gone"),
            seconds=round(seconds, 3),
            answer=account.answer,
            **account.usage,
        )


async def _at_once(
    function: Callable[Arguments, Result], *arguments: Arguments.args, **named: Arguments.kwargs
) -> Result:
    """Call the function here, as ``asyncio.to_thread`` does elsewhere."""
    return function(*arguments, **named)


def _parsed(kind: type[Kind], content: bytes) -> Kind:
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise of_validation(error) from error
