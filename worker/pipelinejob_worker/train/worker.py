"""From an assignment to an exit code: what each failure means to those outside."""

import socket
import traceback
from pathlib import Path
from typing import Protocol

import structlog

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.link import AgentGoneError, AgentLink, Assignment, Failed, Finished, Left
from pipelinejob_worker.logs import configure
from pipelinejob_worker.pipeline.group import PeerLostError
from pipelinejob_worker.protocol import ExitCode, WorkerConfig
from pipelinejob_worker.recovery.pulse import Heart, LeaveError, Pulse
from pipelinejob_worker.recovery.sockets import shut_down, tcp_sockets
from pipelinejob_worker.train.job import Trainer

log = structlog.get_logger()

UNEXPECTED = 1
"""Exit code of a failure that is this stage's own."""


class Job(Protocol):
    """What a worker keeps of its job from one group to the next: a ``Trainer`` or a ``Server``."""

    def run(self, assignment: Assignment, link: AgentLink, pulse: Pulse | None = None) -> ExitCode:
        """Take part in one group; return SUCCEEDED or DRAINED."""


def work(connection: socket.socket) -> int:
    """Train or serve what is assigned, and return the exit code; a failure is told to the agent first.

    Where the agents recover by themselves, this takes part in one incarnation of the group after another.
    """
    link = AgentLink(connection)
    try:
        job: Job | None = None
        while True:
            assignment = link.assignment()
            membership, part = assignment.membership, assignment.part
            attempt = {"attempt": part.incarnation.attempt} if part else {}
            configure(
                job=assignment.config.job, stage=membership.stage, epoch=membership.epoch, process="worker", **attempt
            )
            job = job or _job(assignment.config)
            if part is None:
                return job.run(assignment, link)
            link.send(_take_part(job, assignment, link, Pulse.open(Path(part.pulse))))
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


def _job(config: WorkerConfig) -> Job:
    if config.mode == "Train":
        return Trainer(config)
    from pipelinejob_worker.serve.run import Server  # noqa: PLC0415 - imports for seconds

    return Server(config)


def _take_part(job: Job, assignment: Assignment, link: AgentLink, pulse: Pulse) -> Left | Finished:
    """Train or serve in one incarnation; return how it ended, if not by a failure of this stage's own."""
    before = tcp_sockets()
    heart = Heart(pulse, lambda: shut_down(spare=before))
    try:
        code = job.run(assignment, link, pulse)
    except LeaveError as error:
        return Left(reason="Ordered", message=str(error))
    except PeerLostError as error:
        log.info("left the group", error=str(error))
        return Left(reason="PeerLost", message=str(error))
    finally:
        heart.stop()
    return Finished() if code == ExitCode.SUCCEEDED else Left(reason="Drained")


def _fail(link: AgentLink, code: int, reason: str, message: str) -> int:
    log.error("failed", reason=reason, error=message)
    try:
        link.send(Failed(reason=reason, message=message))
    except AgentGoneError:
        log.warning("the agent has gone before")
    return code
