"""A stage whose group ends as a whole: whatever ends one worker ends its pod, and the operator makes all anew."""

import asyncio
import signal
from collections.abc import AsyncIterator

import structlog

from pipelinejob_worker.agent import ending
from pipelinejob_worker.agent.ending import Ending
from pipelinejob_worker.agent.settings import Settings
from pipelinejob_worker.agent.worker_process import Nursery, WorkerProcess, ZygoteDiedError
from pipelinejob_worker.link import Assignment, Drain, Event, Failed, Joined, Reached
from pipelinejob_worker.protocol import AgentState, AgentStatus, ExitCode, Membership, Progress, WorkerConfig

log = structlog.get_logger()


class Gang:
    """One agent. Three tasks can end it: the worker's end, an impossible membership, a drain."""

    def __init__(self, settings: Settings, config: WorkerConfig, nursery: Nursery) -> None:
        self._settings = settings
        self._config = config
        self._nursery = nursery
        self._worker: asyncio.Future[WorkerProcess] = asyncio.get_running_loop().create_future()
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

    @property
    def progress(self) -> Progress:
        """How far the worker is."""
        return self._progress

    async def run(self, memberships: AsyncIterator[Membership]) -> Ending:
        """Supervise until something ends the pod. Raises ConfigurationError."""
        tasks = [
            asyncio.create_task(self._until_worker_ends()),
            asyncio.create_task(self._until_membership_forbids(memberships)),
            asyncio.create_task(self._until_drain_is_over()),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            # In the order above: when the worker has ended by itself, that is the reason.
            return next(task for task in tasks if task in done).result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _until_worker_ends(self) -> Ending:
        try:
            worker = await self._nursery.start()
        except (ZygoteDiedError, OSError) as error:
            return Ending(1, type(error).__name__, f"no worker could be started: {error}")
        self._worker.set_result(worker)
        async for event in worker.events():
            self._note(event)
        reached = ending.of_worker(await worker.end(), self._failure, self._progress)
        self._state = "Succeeded" if reached.code == ExitCode.SUCCEEDED else "Failed"
        return reached

    async def _until_membership_forbids(self, memberships: AsyncIterator[Membership]) -> Ending:
        group: Membership | None = None
        async for membership in memberships:
            self._membership = membership
            structlog.contextvars.bind_contextvars(epoch=membership.epoch)
            if membership.action == "Stop":
                self.request_drain("the membership says Stop")
            elif group is None:
                group = membership
                await self._assign(membership)
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
        (await self._worker).send(Drain())
        await asyncio.sleep(self._settings.drain_seconds)
        return Ending(
            128 + signal.SIGKILL,
            "DrainDeadline",
            f"the step did not end within {self._settings.drain_seconds:g} s of the request to leave",
        )

    async def _assign(self, membership: Membership) -> None:
        config = self._config
        self._state = "Starting"
        (await asyncio.shield(self._worker)).send(
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


def _group(membership: Membership) -> Membership:
    """The membership without what may change while the group stays."""
    return membership.model_copy(update={"epoch": 1, "protocol_version": 1, "oldest_reader": 1})
