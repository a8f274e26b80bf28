"""From an assignment to an exit code: what each failure means to those outside."""

import socket
import traceback

import structlog

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.link import AgentGoneError, AgentLink, Failed
from pipelinejob_worker.logs import configure
from pipelinejob_worker.pipeline.group import PeerLostError
from pipelinejob_worker.protocol import ExitCode
from pipelinejob_worker.serve.run import Server
from pipelinejob_worker.train.job import run

log = structlog.get_logger()

UNEXPECTED = 1
"""Exit code of a failure that is this stage's own."""


def work(connection: socket.socket) -> int:
    """Wait for the assignment, train it, and return the exit code; a failure is told to the agent first."""
    link = AgentLink(connection)
    try:
        assignment = link.assignment()
        membership = assignment.membership
        configure(job=assignment.config.job, stage=membership.stage, epoch=membership.epoch, process="worker")
        if assignment.config.mode != "Train":
            return Server(assignment.config).run(assignment, link)
        return run(assignment, link)
    except AgentGoneError as error:
        log.warning("stopped", error=str(error))
        return UNEXPECTED
    except ConfigurationError as error:
        return _fail(link, ExitCode.CONFIGURATION, "Configuration", str(error))
    except PeerLostError as error:
        return _fail(link, ExitCode.PEER_LOST, "PeerLost", str(error))
    except Exception as error:  # noqa: BLE001 - whatever it is, the agent must be told
        traceback.print_exc()
        return _fail(link, UNEXPECTED, type(error).__name__, str(error))


def _fail(link: AgentLink, code: int, reason: str, message: str) -> int:
    log.error("failed", reason=reason, error=message)
    try:
        link.send(Failed(reason=reason, message=message))
    except AgentGoneError:
        log.warning("the agent has gone before")
    return code
