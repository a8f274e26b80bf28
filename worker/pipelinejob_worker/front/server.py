"""A front as a whole: connections to engines below, the API above, and an orderly end."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
from aiohttp import web

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.front import engines, tokenizer
from pipelinejob_worker.front.api import Api
from pipelinejob_worker.front.dispatcher import Dispatcher
from pipelinejob_worker.front.settings import Limits, Settings

log = structlog.get_logger()

_KEEPALIVE_SECONDS = 75.0
"""Time that an idle connection, or one whose client has not sent its request's head, stays open."""

_LAST_SECONDS = 1.0
"""Time for clients to take their last words."""


@asynccontextmanager
async def serving(settings: Settings, limits: Limits) -> AsyncIterator[int]:
    """Serve during the block, and yield the port; behind it, let accepted requests finish in their time.

    Raises ConfigurationError when the tokenizer, its template or the token file cannot be used.
    """
    _check_token(settings)
    dispatcher = Dispatcher(limits)
    api = Api(settings, limits, tokenizer.load(settings), dispatcher)
    runner = web.AppRunner(
        api.application(),
        access_log=None,
        handler_cancellation=True,
        keepalive_timeout=_KEEPALIVE_SECONDS,
        shutdown_timeout=_LAST_SECONDS,
    )
    await runner.setup()
    async with asyncio.TaskGroup() as group:
        connections = group.create_task(engines.run(settings.engines_file, dispatcher, limits))
        try:
            site = web.TCPSite(runner, settings.host or None, settings.port)
            await site.start()
            yield runner.addresses[0][1]
            await site.stop()
            await _drain(api, dispatcher, limits.drain_seconds)
        finally:
            connections.cancel()
            await runner.cleanup()


async def _drain(api: Api, dispatcher: Dispatcher, seconds: float) -> None:
    """Let what is under way finish; tell those that are left when the time is over."""
    api.draining = True
    log.info("draining", unfinished=dispatcher.running + dispatcher.waiting)
    if not await _idle(api, seconds):
        log.warning("giving up", unfinished=dispatcher.running + dispatcher.waiting)
        dispatcher.give_up()
        await _idle(api, _LAST_SECONDS)


async def _idle(api: Api, seconds: float) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await api.idle.wait()
    return api.idle.is_set()


def _check_token(settings: Settings) -> None:
    path = settings.bearer_token_file
    if path is None:
        return
    try:
        token = path.read_bytes().strip()
    except OSError as error:
        raise ConfigurationError(
            f"serve.bearerTokenSecretName: {path} cannot be read: {error.strerror}; mount the Secret there"
        ) from error
    if not token:
        raise ConfigurationError(
            f"serve.bearerTokenSecretName: {path} is empty; allowed: a token of any length; put one into the Secret"
        )
