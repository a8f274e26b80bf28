"""A front's process: ``python -m pipelinejob_worker.front``."""

import asyncio
import os
import signal
import sys

import structlog

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.front.server import serving
from pipelinejob_worker.front.settings import Limits, Settings, from_environment
from pipelinejob_worker.logs import configure
from pipelinejob_worker.protocol import ExitCode

log = structlog.get_logger()


def main() -> int:
    """Serve until SIGTERM or SIGINT; return the exit code."""
    configure(process="front")
    try:
        settings, limits = from_environment(os.environ)
        asyncio.run(_run(settings, limits))
    except ConfigurationError as error:
        log.error("failed", error=str(error))  # noqa: TRY400 - the message says it all
        return ExitCode.CONFIGURATION
    return ExitCode.SUCCEEDED


async def _run(settings: Settings, limits: Limits) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with serving(settings, limits) as port:
        log.info("serving", model=settings.model, port=port)
        await stop.wait()


if __name__ == "__main__":
    sys.exit(main())
