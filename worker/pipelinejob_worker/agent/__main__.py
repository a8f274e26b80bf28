"""Process 1 of a stage pod: ``python -m pipelinejob_worker.agent``."""

import asyncio
import os
import sys

import structlog

from pipelinejob_worker.agent.ending import Ending, termination
from pipelinejob_worker.agent.settings import Settings, from_environment
from pipelinejob_worker.agent.supervisor import supervise, write_termination
from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.logs import configure
from pipelinejob_worker.protocol import ExitCode, Progress

log = structlog.get_logger()


def main() -> int:
    """Run the agent of this pod; return its exit code."""
    configure(process="agent")
    try:
        settings = from_environment(os.environ)
    except ConfigurationError as error:
        log.error("failed", error=str(error))  # noqa: TRY400 - the message says it all
        return ExitCode.CONFIGURATION
    return run(settings)


def run(settings: Settings) -> int:
    """Run an agent with these settings; whatever happens, it leaves a termination message."""
    configure(process="agent", job=settings.job, stage=settings.stage, pipeline=settings.pipeline)
    try:
        return asyncio.run(supervise(settings))
    except Exception as error:
        log.exception("agent failed")
        reached = Ending(1, type(error).__name__, f"the agent failed: {error}")
        write_termination(settings, termination(settings.stage, reached, Progress(), []))
        return reached.code


if __name__ == "__main__":
    sys.exit(main())
