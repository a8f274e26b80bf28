"""The life of a stage pod: serve its status, wait for its configuration, supervise, say why it ended."""

import asyncio
import signal
from collections.abc import AsyncIterator
from typing import Protocol

import structlog

from pipelinejob_worker.agent import ending, pod_info
from pipelinejob_worker.agent.ending import Ending
from pipelinejob_worker.agent.gang import Gang
from pipelinejob_worker.agent.ladder import Ladder
from pipelinejob_worker.agent.program import program_of
from pipelinejob_worker.agent.settings import Settings
from pipelinejob_worker.agent.status_server import serve
from pipelinejob_worker.agent.worker_process import Nursery
from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.protocol import TRACE_FILE, AgentStatus, ExitCode, Membership, Progress, WorkerConfig

log = structlog.get_logger()


class Supervision(Protocol):
    """How failures are answered: ``Ladder`` or ``Gang``."""

    @property
    def progress(self) -> Progress:
        """How far the worker is."""

    def status(self) -> AgentStatus:
        """What this agent knows now."""

    def request_drain(self, why: str) -> None:
        """Leave."""

    async def run(self, memberships: AsyncIterator[Membership]) -> Ending:
        """Supervise until something ends the pod. Raises ConfigurationError."""


class Agent:
    """One pod's agent."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._supervision: Supervision | None = None
        self._nursery: Nursery | None = None
        self._drain = asyncio.Event()

    def status(self) -> AgentStatus:
        """What this agent knows now."""
        if self._supervision:
            return self._supervision.status()
        return AgentStatus(job_uid=self._settings.job_uid, stage=self._settings.stage, epoch=0, state="Waiting")

    def request_drain(self, why: str) -> None:
        """Leave: as the supervision does it, or at once when there is none yet."""
        self._drain.set()
        if self._supervision:
            self._supervision.request_drain(why)

    async def run(self) -> Ending:
        """Supervise until something ends the pod."""
        try:
            config = await self._until_configured()
            if config is None:
                return Ending(ExitCode.DRAINED, "Drained", "asked to leave before the group had formed")
            return await self._supervise(config)
        except ConfigurationError as error:
            return Ending(ExitCode.CONFIGURATION, "Configuration", str(error))

    async def close(self) -> None:
        """End the workers."""
        if self._nursery:
            await self._nursery.stop()

    def termination(self, reached: Ending) -> bytes:
        """The termination message for the kubelet."""
        progress = self._supervision.progress if self._supervision else Progress()
        tail = list(self._nursery.tail) if self._nursery else []
        return ending.termination(self.status().stage, reached, progress, tail)

    async def _until_configured(self) -> WorkerConfig | None:
        """Wait for the configuration; None when asked to leave before."""
        config = asyncio.create_task(pod_info.config(self._settings.pod_info))
        drain = asyncio.create_task(self._drain.wait())
        await asyncio.wait([config, drain], return_when=asyncio.FIRST_COMPLETED)
        drain.cancel()
        if config.done():
            return config.result()
        config.cancel()
        return None

    async def _supervise(self, config: WorkerConfig) -> Ending:
        settings = self._settings
        nursery = self._nursery = Nursery(program_of(config, settings.entry))
        place: tuple[int, int] | None = (settings.stage, settings.pipeline)
        if config.recovery.strategy == "Ladder":
            self._supervision, place = Ladder(settings, config, nursery), None
        else:
            self._supervision = Gang(settings, config, nursery)
        if self._drain.is_set():
            self._supervision.request_drain("asked to leave before")
        return await self._supervision.run(pod_info.memberships(settings.pod_info, place))


async def supervise(settings: Settings) -> int:
    """Run an agent to its end, leave its termination message, and return its exit code."""
    agent = Agent(settings)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, agent.request_drain, signal.Signals(number).name)
    try:
        trace = settings.scratch_directory / TRACE_FILE
        async with serve(settings.status_port, agent.status, trace) as port:
            log.info("agent started", port=port)
            reached = await agent.run()
    finally:
        await agent.close()
    write_termination(settings, agent.termination(reached))
    log.info("agent ends", code=reached.code, reason=reached.reason, message=reached.message)
    return reached.code


def write_termination(settings: Settings, content: bytes) -> None:
    """Leave the termination message; without one the exit code still tells most."""
    try:
        settings.termination_log.write_bytes(content)
    except OSError as error:
        log.warning("termination message not written", error=str(error))
