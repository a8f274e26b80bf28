"""The life of a stage pod: start the worker, hand it the membership, watch it, drain it, say why it ended."""

import asyncio
import signal

import structlog

from pipelinejob_worker.agent import ending, pod_info
from pipelinejob_worker.agent.ending import Ending
from pipelinejob_worker.agent.settings import Settings
from pipelinejob_worker.agent.status_server import serve
from pipelinejob_worker.agent.worker_process import WorkerProcess
from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.link import Assignment, Drain, Event, Failed, Joined, Reached
from pipelinejob_worker.protocol import (
    TRACE_FILE,
    AgentState,
    AgentStatus,
    ExitCode,
    Membership,
    Progress,
    WorkerConfig,
)

log = structlog.get_logger()


class Supervisor:
    """One agent. Three tasks can end it: the worker's end, an impossible membership, a drain."""

    def __init__(self, settings: Settings, worker: WorkerProcess) -> None:
        self._settings = settings
        self._worker = worker
        self._state: AgentState = "Waiting"
        self._membership: Membership | None = None
        self._layers = ""
        self._progress = Progress()
        self._failure: Failed | None = None
        self._drain = asyncio.Event()

    def status(self) -> AgentStatus:
        """What this agent knows now."""
        return AgentStatus(
            job_uid=self._settings.job_uid,
            stage=self._settings.stage,
            epoch=self._membership.epoch if self._membership else 0,
            state=self._state,
            layers=self._layers,
            progress=self._progress,
        )

    def request_drain(self, why: str) -> None:
        """Leave: after the present step together with all stages, or at once when there is no group yet."""
        if not self._drain.is_set():
            log.info("drain requested", why=why, state=self._state)
            self._drain.set()

    async def run(self) -> Ending:
        """Supervise until something ends the pod."""
        tasks = [
            asyncio.create_task(self._until_worker_ends()),
            asyncio.create_task(self._until_membership_forbids()),
            asyncio.create_task(self._until_drain_is_over()),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            # In the order above: when the worker has ended by itself, that is the reason.
            return next(task for task in tasks if task in done).result()
        except ConfigurationError as error:
            return Ending(ExitCode.CONFIGURATION, "Configuration", str(error))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def termination(self, reached: Ending) -> bytes:
        """The termination message for the kubelet."""
        return ending.termination(self._settings.stage, reached, self._progress, list(self._worker.tail))

    async def _until_worker_ends(self) -> Ending:
        async for event in self._worker.events():
            self._note(event)
        reached = ending.of_worker(await self._worker.end(), self._failure, self._progress)
        self._state = "Succeeded" if reached.code == ExitCode.SUCCEEDED else "Failed"
        return reached

    async def _until_membership_forbids(self) -> Ending:
        config = await pod_info.config(self._settings.pod_info)
        group: Membership | None = None
        place = (self._settings.stage, self._settings.pipeline)
        async for membership in pod_info.memberships(self._settings.pod_info, *place):
            self._membership = membership
            structlog.contextvars.bind_contextvars(epoch=membership.epoch)
            if membership.action == "Stop":
                self.request_drain("the membership says Stop")
            elif group is None:
                group = membership
                self._assign(config, membership)
            elif _group(membership) != _group(group):
                return Ending(
                    ExitCode.PEER_LOST,
                    "Superseded",
                    f"epoch {membership.epoch} is of another group than epoch {group.epoch}, which was handed over",
                )
        raise AssertionError("memberships never end")

    async def _until_drain_is_over(self) -> Ending:
        await self._drain.wait()
        if self._state != "Running":
            return Ending(ExitCode.DRAINED, "Drained", "asked to leave before the group had formed")
        self._state = "Draining"
        self._worker.send(Drain())
        await asyncio.sleep(self._settings.drain_seconds)
        return Ending(
            128 + signal.SIGKILL,
            "DrainDeadline",
            f"the step did not end within {self._settings.drain_seconds:g} s of the request to leave",
        )

    def _assign(self, config: WorkerConfig, membership: Membership) -> None:
        self._state = "Starting"
        self._worker.send(
            Assignment(
                membership=membership,
                config=config,
                attempt=self._settings.attempt,
                checkpoint_directory=(
                    str(self._settings.checkpoint_directory) if config.checkpoint.volume_claim_name else ""
                ),
                scratch_directory=str(self._settings.scratch_directory),
            )
        )
        log.info(
            "membership accepted",
            stages=membership.stages,
            pipelines=membership.pipelines,
            master=membership.master_address,
        )

    def _note(self, event: Event) -> None:
        match event:
            case Joined(layers=layers):
                self._layers = layers
                self._state = "Running"
            case Reached(progress=progress):
                self._progress = progress
            case Failed():
                self._failure = event


async def supervise(settings: Settings) -> int:
    """Run an agent to its end, leave its termination message, and return its exit code."""
    worker = await WorkerProcess.start(settings.worker)
    supervisor = Supervisor(settings, worker)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, supervisor.request_drain, signal.Signals(number).name)
    try:
        trace = settings.scratch_directory / TRACE_FILE
        async with serve(settings.status_port, supervisor.status, trace) as port:
            log.info("agent started", port=port)
            reached = await supervisor.run()
    finally:
        await worker.kill()
    write_termination(settings, supervisor.termination(reached))
    log.info("agent ends", code=reached.code, reason=reached.reason, message=reached.message)
    return reached.code


def write_termination(settings: Settings, content: bytes) -> None:
    """Leave the termination message; without one the exit code still tells most."""
    try:
        settings.termination_log.write_bytes(content)
    except OSError as error:
        log.warning("termination message not written", error=str(error))


def _group(membership: Membership) -> Membership:
    """The membership without what may change while the group stays."""
    return membership.model_copy(update={"epoch": 1, "protocol_version": 1, "oldest_reader": 1})
