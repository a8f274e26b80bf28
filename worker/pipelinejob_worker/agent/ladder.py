"""A stage whose agents recover by themselves: epoch after epoch of the operator's, incarnations between them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import structlog

from pipelinejob_worker.agent.ending import Ending
from pipelinejob_worker.agent.rank import Rank
from pipelinejob_worker.agent.settings import Settings
from pipelinejob_worker.agent.tasks import Tasks
from pipelinejob_worker.agent.worker_process import Nursery, ZygoteDiedError
from pipelinejob_worker.protocol import (
    FAILURES_KEPT,
    OLDEST_READER,
    RECOVERY_SINCE,
    AgentState,
    AgentStatus,
    ExitCode,
    FailureRecord,
    Membership,
    Progress,
    Traffic,
    WorkerConfig,
)
from pipelinejob_worker.recovery.coordination import CoordinatorServer, Member
from pipelinejob_worker.recovery.incarnation import Coordinator
from pipelinejob_worker.recovery.transport import Address

log = structlog.get_logger()


class Ladder:
    """One agent."""

    def __init__(self, settings: Settings, config: WorkerConfig, nursery: Nursery) -> None:
        """Raises OSError when the memory cannot be used."""
        self._settings = settings
        self._nursery = nursery
        self._tasks = Tasks()
        self._rank = Rank(settings, config, nursery, self._tasks)
        self._keeper, self._records = self._rank.keeper, self._rank.records
        self._membership: Membership | None = None
        self._member: Member | None = None
        self._coordinator: Coordinator | None = None
        self._server: CoordinatorServer | None = None
        self._drain = asyncio.Event()
        self._warm = False
        self._begun = False
        self._ended: Ending | None = None

    @property
    def progress(self) -> Progress:
        """How far the worker is."""
        return self._rank.progress

    def status(self) -> AgentStatus:
        """What this agent knows now."""
        membership, member, state = self._membership, self._member, self._state()
        keeper = self._keeper
        return AgentStatus(
            oldest_reader=RECOVERY_SINCE if state in ("Recovering", "Standby") else OLDEST_READER,
            job_uid=self._settings.job_uid,
            stage=membership.stage if membership else self._settings.stage,
            epoch=membership.epoch if membership else 0,
            state=state,
            layers=self._rank.layers,
            progress=self._rank.progress,
            incarnation_attempt=self._rank.attempt,
            worker_restarts=self._records.restarts,
            failures=tuple(self._failures()),
            protection=self._rank.protection,
            traffic=Traffic(
                pieces_sent_bytes=keeper.bytes_sent,
                pieces_received_bytes=keeper.bytes_received,
                pieces_fetched_bytes=keeper.bytes_fetched,
            ),
            recovery=self._rank.recovery,
            released=member is not None and member.released,
            refused=member.refused if member else "",
        )

    def request_drain(self, why: str) -> None:
        """Leave: after the present step, with its snapshot in another pod, or at once when there is no group yet."""
        if not self._drain.is_set():
            log.info("drain requested", why=why)
            self._drain.set()

    async def run(self, memberships: AsyncIterator[Membership]) -> Ending:
        """Take part until something ends the pod. Raises ConfigurationError, and OSError when the memory fails."""
        if self._keeper.memory.done:
            return Ending(ExitCode.SUCCEEDED, "Succeeded", "all steps were done before")
        self._keeper.start("", self._settings.pieces_port)
        self._tasks.spawn("warm up", self._warm_up())
        self._tasks.spawn("memberships", self._follow(memberships))
        drained = asyncio.create_task(self._until_drained())
        ended, failed = self._rank.ended, self._tasks.failed
        try:
            waiting: list[asyncio.Future[Any]] = [drained, ended, failed]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if failed.done() and not ended.done():
                raise failed.result()
            self._ended = ended.result() if ended.done() else drained.result()
        finally:
            drained.cancel()
            await self._close()
        self._records.end()
        return self._ended

    async def _warm_up(self) -> None:
        """Have everything imported before it is needed; who needs it sees why that fails."""
        try:
            await self._nursery.ready()
            self._warm = True
        except ZygoteDiedError as error:
            log.warning("the zygote has ended", error=str(error))

    async def _follow(self, memberships: AsyncIterator[Membership]) -> None:
        """Enter one epoch after another."""
        async for membership in memberships:
            if membership.action == "Stop":
                self._membership = membership
                self.request_drain("the membership says Stop")
                continue
            if self._drain.is_set():
                continue
            await self._leave_epoch()
            self._membership = membership
            structlog.contextvars.bind_contextvars(
                epoch=membership.epoch, stage=membership.stage, pipeline=membership.pipeline
            )
            log.info("membership accepted", action=membership.action, rank=membership.rank, of=membership.world_size)
            if membership.action == "Standby":
                continue
            first, self._begun = not self._begun, True
            if first and (final := self._records.begin(membership.rank)):
                self._rank.ended.set_result(final)
                return
            await self._begin_epoch(membership)

    async def _begin_epoch(self, membership: Membership) -> None:
        host = membership.master_address
        if membership.action == "Run" and membership.rank == 0:
            uid, world = self._settings.job_uid, membership.world_size
            self._coordinator = Coordinator(uid, membership.epoch, world, self._rank.listen)
            self._server = CoordinatorServer(self._coordinator)
            self._server.start("", self._settings.coordinator_port)
            host = "localhost"
        member = self._member = Member(self._rank, Address(host, self._settings.coordinator_port))
        self._rank.become(membership, member)
        self._tasks.spawn("member", member.run())
        self._tasks.spawn("done", self._until_done(member))

    async def _leave_epoch(self) -> None:
        """Leave the group, at a step boundary if one comes soon, and the coordinator."""
        if self._member is None:
            return
        await self._rank.pause()
        await self._tasks.stop("done")
        await self._tasks.stop("member")
        await self._rank.leave()
        self._member = None
        await self._stop_coordinator()

    async def _until_done(self, member: Member) -> None:
        """Wait until all ranks have finished."""
        await member.done.wait()
        self._keeper.remember(self._keeper.memory.model_copy(update={"done": True}))
        if not self._rank.ended.done():
            steps = self._rank.progress.total_steps
            self._rank.ended.set_result(Ending(ExitCode.SUCCEEDED, "Succeeded", f"all {steps} steps are done"))

    async def _until_drained(self) -> Ending:
        await self._drain.wait()
        stops = self._membership is not None and self._membership.action == "Stop"
        if stops and self._rank.has_run:
            await self._until_stoppable()
        if not self._rank.running:
            return Ending(ExitCode.DRAINED, "Drained", "asked to leave while there was no group")
        if await self._rank.hand_over(self._settings.drain_seconds, copies=not stops):
            return Ending(ExitCode.DRAINED, "Drained", f"stopped after step {self.progress.step} as asked")
        message = f"the step did not end within {self._settings.drain_seconds:g} s of the request to leave"
        return Ending(ExitCode.DRAINED, "DrainDeadline", message)

    async def _until_stoppable(self) -> None:
        """A job that is stopped while it recovers is given time to do so: only a group can save a checkpoint."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain_seconds):
                await self._rank.stoppable.wait()

    async def _close(self) -> None:
        """End everything but the zygote; what the coordinator has said last is still sent."""
        await self._tasks.close()
        await self._stop_coordinator()
        await self._keeper.stop()
        self._rank.close()

    async def _stop_coordinator(self) -> None:
        server, self._server, self._coordinator = self._server, None, None
        if server:
            await server.stop()

    def _failures(self) -> list[FailureRecord]:
        """The newest that are known here: this rank's, and on rank 0 what the others have told."""
        told = self._coordinator.records if self._coordinator else []
        known = {(record.rank, record.at): record for record in (*told, *self._records.failures)}
        return sorted(known.values(), key=lambda record: record.at)[-FAILURES_KEPT:]

    def _state(self) -> AgentState:
        if self._ended:
            return "Succeeded" if self._ended.code == ExitCode.SUCCEEDED else "Failed"
        if self._drain.is_set() or (self._membership and self._membership.action == "Leave"):
            return "Draining"
        if self._member is None:
            stands_by = self._settings.spare or (self._membership and self._membership.action == "Standby")
            return "Standby" if stands_by and self._warm else "Waiting"
        if self._rank.running:
            return "Running"
        return "Recovering" if self._rank.has_run else "Starting"
