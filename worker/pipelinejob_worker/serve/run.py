"""The worker of a Serve or Batch job: one incarnation of its group after another, with the same loaded layers."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from pipelinejob_worker.link import AgentGoneError, AgentLink, Assignment
from pipelinejob_worker.pipeline.group import PeerLostError, prepare_device
from pipelinejob_worker.protocol import RING_PORT, SOURCE_DIRECTORY, Env, ExitCode, WorkerConfig
from pipelinejob_worker.serve.hop import HopError
from pipelinejob_worker.serve.job import ServeJob
from pipelinejob_worker.serve.ring import Departure, Member

log = structlog.get_logger()

LOOK_SECONDS = 0.1


class Server:
    """What the worker keeps from one incarnation to the next."""

    def __init__(self, config: WorkerConfig) -> None:
        """Raises ConfigurationError when the model cannot be read."""
        self._job = ServeJob(config, prepare_device(), Path(SOURCE_DIRECTORY), host=os.environ.get(Env.POD_IP, ""))

    def run(self, assignment: Assignment, link: AgentLink) -> ExitCode:
        """Serve until a Batch job's file is answered or a drain; return SUCCEEDED or DRAINED.

        Raises ConfigurationError, PeerLostError and AgentGoneError.
        """
        with _obeying(link) as orders:
            try:
                self._job.take_part(_member(assignment), orders.departure, link.send)
            except HopError as error:
                if orders.gone:
                    raise orders.gone from error
                if not orders.departure.ordered:
                    raise PeerLostError(str(error)) from error
                log.info("drained")
                return ExitCode.DRAINED
        return ExitCode.SUCCEEDED


def _member(assignment: Assignment) -> Member:
    """Return a stage's place in the ring of its own pipeline. The last stage's next one is stage 0."""
    membership = assignment.membership
    following = membership.next_address or membership.master_address
    return Member(
        epoch=membership.epoch,
        stage=membership.stage,
        stages=membership.stages,
        next_address=(following, RING_PORT) if membership.stages > 1 else None,
    )


class _Orders:
    """What the agent has said while the main thread waits for neighbours."""

    def __init__(self) -> None:
        self.departure = Departure()
        self.gone: AgentGoneError | None = None


@contextmanager
def _obeying(link: AgentLink) -> Iterator[_Orders]:
    """Leave the group when the agent asks for it or is gone."""
    ended = threading.Event()
    orders = _Orders()

    def obey() -> None:
        try:
            while not ended.wait(LOOK_SECONDS):
                if link.drain_requested():
                    orders.departure.order()
        except AgentGoneError as error:
            orders.gone = error
            orders.departure.order()

    thread = threading.Thread(target=obey, name="orders", daemon=True)
    thread.start()
    try:
        yield orders
    finally:
        ended.set()
        thread.join()
