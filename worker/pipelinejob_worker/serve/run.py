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
from pipelinejob_worker.recovery.pulse import Doing, LeaveError, Pulse
from pipelinejob_worker.serve.hop import HopError
from pipelinejob_worker.serve.job import ServeJob
from pipelinejob_worker.serve.ring import Departure, Member

log = structlog.get_logger()

LOOK_SECONDS = 0.1

ATTEMPTS_PER_EPOCH = 1 << 20
"""So that the epochs of rings grow with every incarnation, as fronts expect it."""


class Server:
    """What the worker keeps from one incarnation to the next."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._device = prepare_device()
        self._job: ServeJob | None = None

    def run(self, assignment: Assignment, link: AgentLink, pulse: Pulse | None = None) -> ExitCode:
        """Serve until a Batch job's file is answered or a drain; return SUCCEEDED or DRAINED.

        ``pulse``: where the agents recover by themselves. Raises ConfigurationError, PeerLostError, LeaveError and
        AgentGoneError.
        """
        if self._job is None:
            host = assignment.part.addresses[0] if assignment.part else os.environ.get(Env.POD_IP, "")
            self._job = ServeJob(self._config, self._device, Path(SOURCE_DIRECTORY), host=host)

        with _obeying(link, pulse) as orders:
            try:
                self._job.take_part(_member(assignment), orders.departure, link.send)
            except HopError as error:
                if orders.gone:
                    raise orders.gone from error
                if pulse and pulse.must_leave:
                    raise LeaveError("the agent has ordered to leave the ring") from error
                if not orders.departure.ordered:
                    raise PeerLostError(str(error)) from error
                log.info("drained")
                return ExitCode.DRAINED
        return ExitCode.SUCCEEDED


def _member(assignment: Assignment) -> Member:
    """Return a stage's place in the ring of its own pipeline. The last stage's next one is stage 0.

    Where agents recover by themselves, they know the addresses better than the membership, and count incarnations.
    """
    membership, part = assignment.membership, assignment.part
    following = part.addresses[1] if part else membership.next_address or membership.master_address
    return Member(
        epoch=membership.epoch * ATTEMPTS_PER_EPOCH + (part.incarnation.attempt if part else 0),
        stage=membership.stage,
        stages=membership.stages,
        next_address=(following, RING_PORT) if membership.stages > 1 else None,
    )


class _Orders:
    """What the agent has said while the main thread waits for neighbours."""

    def __init__(self, pulse: Pulse | None) -> None:
        self._pulse = pulse
        self.departure = Departure(self._show)
        self.gone: AgentGoneError | None = None

    def _show(self, waits: bool) -> None:
        """Show the agent that the main thread moves. Raises LeaveError."""
        if self._pulse:
            self._pulse.move(Doing.WAITING if waits else Doing.COMPUTING)


@contextmanager
def _obeying(link: AgentLink, pulse: Pulse | None) -> Iterator[_Orders]:
    """Leave the group when the agent asks for it or is gone."""
    ended = threading.Event()
    orders = _Orders(pulse)

    def obey() -> None:
        try:
            while not ended.wait(LOOK_SECONDS):
                if link.drain_requested() or (pulse and pulse.must_leave):
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
