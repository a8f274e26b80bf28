"""A rank at the coordinator's word: its worker in one incarnation after another, its snapshots and its failures."""

import asyncio
import shutil
import socket
import time

import structlog

from pipelinejob_worker.agent.charge import Charge
from pipelinejob_worker.agent.ending import Ending
from pipelinejob_worker.agent.records import Records
from pipelinejob_worker.agent.settings import Settings
from pipelinejob_worker.agent.tasks import Tasks
from pipelinejob_worker.agent.worker_process import Nursery, ZygoteDiedError
from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.link import (
    Assignment,
    Divided,
    Drain,
    Event,
    Fetched,
    Finished,
    Guarded,
    Joined,
    Left,
    Part,
    Reached,
    Valid,
)
from pipelinejob_worker.protocol import (
    ExitCode,
    Membership,
    Progress,
    ProtectionStatus,
    RecoveryStatus,
    WorkerConfig,
)
from pipelinejob_worker.recovery import messages
from pipelinejob_worker.recovery.coordination import Member
from pipelinejob_worker.recovery.cut import Cut
from pipelinejob_worker.recovery.deadlines import wait_after
from pipelinejob_worker.recovery.keeper import Keeper
from pipelinejob_worker.recovery.messages import Join, Plan
from pipelinejob_worker.recovery.pieces import Incarnation
from pipelinejob_worker.recovery.transport import Address, TransferError, listen

log = structlog.get_logger()

COPY_SHARE = 0.6
"""Share of the time between two snapshots over which a copy is spread."""

ATTEMPTS_PER_EPOCH = 10_000
"""For a number of each incarnation, which names the checkpoints that it writes."""

_PULSE = "pulse"


class Rank:
    """What the coordinator makes of this pod (``recovery.coordination.Stage``), and the worker's answers."""

    def __init__(self, settings: Settings, config: WorkerConfig, nursery: Nursery, tasks: Tasks) -> None:
        """Raises OSError when the memory cannot be used."""
        self._settings = settings
        self._config = config
        self._nursery = nursery
        self._tasks = tasks
        directory = settings.recovery_directory
        self.keeper = Keeper(
            directory,
            job_uid=settings.job_uid,
            rank=0,
            limit_bytes=config.recovery.memory_bytes or shutil.disk_usage(directory).total,
            guarded=self._note_guarded,
            settled=self._note_settled,
            stored=self._note_stored,
        )
        self.records = Records(self.keeper, config.recovery, settings.node, nursery.tail)
        self._address = Address(settings.address, settings.pieces_port)
        self._charge = Charge(nursery, tasks, self._note, self._worker_failed, self._worker_stuck)
        self._membership: Membership | None = None
        self._member: Member | None = None
        self._plan: Plan | None = None
        self._listener: socket.socket | None = None
        self._copy_began = 0.0
        self._broke_at: float | None = None
        self._leaving = False
        self._fruitless = 0
        self._no_snapshots = ""
        self._protection = ProtectionStatus()
        self.ended: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        """How the agent has to end, once that is clear."""

        self.running = False
        """Whether the worker trains in its group."""

        self.has_run = False
        self.stoppable = asyncio.Event()
        """Set while the worker trains in its group, or after it has left because all were asked to."""

        self.layers = ""
        self.progress = Progress()
        self.recovery = RecoveryStatus()

    @property
    def protection(self) -> ProtectionStatus:
        """How well the newest steps are kept."""
        problem = self._no_snapshots or self.keeper.guard_problem or self._protection.problem
        return self._protection.model_copy(update={"problem": problem})

    @property
    def attempt(self) -> int:
        """Of the newest incarnation in this epoch."""
        return self._plan.incarnation.attempt if self._plan else 0

    @property
    def patience(self) -> float:
        """How long to wait for a step boundary before a rescale breaks the step off."""
        return min(60.0, 5.0 + 2 * (self.progress.step_seconds or 0.0))

    def become(self, membership: Membership, member: Member) -> None:
        """Take a place in a new epoch; the worker is in no group."""
        self._membership, self._member, self._plan = membership, member, None
        self.keeper.become(membership.rank)

    # What the coordinator says

    def listen(self, incarnation: Incarnation) -> int:
        """Open the socket of an incarnation's store, before anyone connects to it; return the port."""
        self._close_listener()
        self._listener = listen()
        port: int = self._listener.getsockname()[1]
        log.info("the group meets here", incarnation=str(incarnation), port=port)
        return port

    async def join(self) -> Join:
        """Return what this rank holds, once a worker may start, and could at once."""
        membership = self._membership
        assert membership
        if self._leaving:
            await asyncio.Future()  # this pod is on its way out, and in no group any more
        while membership.action == "Run" and not await self._can_start():
            pass
        delay = max(self.records.not_before - time.monotonic(), wait_after(self._fruitless))
        if delay > 0:
            log.info("waiting before the next start", seconds=round(delay, 1))
            await asyncio.sleep(delay)
        return self.keeper.join(
            epoch=membership.epoch,
            world_size=membership.world_size,
            leaving=membership.leavers,
            node=self._settings.node,
            address=self._address,
            cut=self._cut(),
        )

    async def apply(self, plan: Plan) -> None:
        """Write the plan down, and invalidate what it makes void. Raises OSError."""
        await self.keeper.apply(plan)
        self._plan = plan

    async def start(self, plan: Plan) -> None:
        """Have the worker join the group; fork one if there is none. Returns without waiting for it. Raises OSError."""
        membership = self._membership
        assert membership
        if membership.action == "Leave":
            return
        self._fruitless += 1
        self._note_resumption(plan)
        try:
            if await self._charge.ensure():
                self.records.started()
        except (ZygoteDiedError, OSError) as error:
            self._worker_failed(Ending(1, type(error).__name__, f"no worker could be started: {error}"))
            return
        listener, self._listener = self._listener, None
        pulse = self._settings.recovery_directory / _PULSE
        self._charge.take_part(
            self._assignment(membership, plan),
            [listener.fileno()] if listener else [],
            pulse,
            self._config.recovery.hang_timeout_seconds,
        )
        if listener:
            listener.close()
        if plan.cut and plan.step is not None:
            self._tasks.spawn("fetch", self._fetch(plan, plan.cut))

    async def abort(self, incarnation: Incarnation, reason: str) -> None:
        """Have the worker leave the group, or end it; return when it is out."""
        await self.leave()

    async def leave(self) -> None:
        """Leave the group, if the worker is in one."""
        self._broke()
        await self._tasks.stop("fetch")
        await self._charge.leave()
        if self._leaving:
            await self.keeper.hand_over()
        await self.keeper.leave()
        self._close_listener()

    # What the pod wants

    async def pause(self) -> None:
        """Have all ranks leave at a step boundary, for another epoch; what takes too long is broken off later."""
        if self.running and not await self._charge.pause(Drain(checkpoint=False), self.patience):
            log.warning("the step does not end", seconds=self.patience)

    async def hand_over(self, seconds: float, *, copies: bool) -> bool:
        """Leave for good, at a step boundary; return whether that is done in time.

        ``copies``: with the snapshot of the step at the guard, if that can be reached.
        """
        self._leaving = True
        try:
            async with asyncio.timeout(seconds):
                await self._charge.pause(Drain(), seconds)
                if copies:
                    await self.keeper.hand_over()
        except TimeoutError:
            return False
        return not self._charge.in_group

    def close(self) -> None:
        """Give back what the tasks do not."""
        self._close_listener()

    # What others say

    def _note_guarded(self, step: int) -> None:
        """The guard has acknowledged a step."""
        self._charge.send(Guarded(step=step, seconds=time.monotonic() - self._copy_began))

    def _note_settled(self) -> None:
        """Every rank holds a step of this incarnation."""
        if self._member and self._plan:
            self._member.tell(messages.Settled(incarnation=self._plan.incarnation))

    def _note_stored(self) -> None:
        """A copy has come; perhaps from a rank that leaves, after this one has joined."""
        if self._member and self._member.incarnation is None:
            self._member.tell(messages.Holds(held=self.keeper.store.held()))

    def _note(self, event: Event) -> None:
        """Take in what the worker tells of its group."""
        plan, member = self._plan, self._member
        assert plan
        assert member
        match event:
            case Divided(cut=cut):
                if cut != self.keeper.memory.cut:
                    self.keeper.remember(self.keeper.memory.model_copy(update={"cut": cut}))
                if plan.step is not None and plan.cut is None:
                    self._tasks.spawn("fetch", self._fetch(plan, cut))
            case Joined(layers=layers, problem=problem):
                self.layers, self._no_snapshots = layers, problem
                self.running = self.has_run = True
                self.stoppable.set()
            case Reached():
                self._note_progress(event)
            case Valid(step=step):
                self._copy_began = time.monotonic()
                self.keeper.protect(step)
            case Left(reason=reason, message=message):
                self._broke()
                if reason == "Drained":
                    self.stoppable.set()
                self._charge.note_out()
                member.report(plan.incarnation, reason, message, own=False)
            case Finished():
                self._charge.note_out()
                member.tell(messages.Finished(incarnation=plan.incarnation))

    def _note_progress(self, event: Reached) -> None:
        progress, protection = event.progress, event.protection
        if self._broke_at is not None and (progress.step > self.recovery.resumed_step or progress.serving):
            pause = time.monotonic() - self._broke_at
            self._broke_at = None
            self.recovery = self.recovery.model_copy(update={"last_pause_seconds": pause})
        if progress.step > self.recovery.resumed_step or progress.serving:
            self._fruitless = 0
        self.progress = progress
        self._charge.note_progress(progress)
        if protection:
            self._protection = protection
            self.keeper.copy_seconds = COPY_SHARE * protection.interval_steps * (progress.step_seconds or 0.0)

    def _worker_failed(self, ended: Ending) -> None:
        """The worker has ended by its own fault, or could not start."""
        self._broke()
        incarnation = self._plan.incarnation if self._plan else self.keeper.memory.incarnation
        if self._member:
            self._member.report(incarnation, ended.reason, ended.message, own=True)
        self._crashed(ended, incarnation)

    def _worker_stuck(self, message: str) -> None:
        """The worker waits for others in vain, which is not its fault."""
        if self._member and self._plan:
            self._member.report(self._plan.incarnation, "Stuck", message, own=False)

    def _crashed(self, ended: Ending, incarnation: Incarnation) -> None:
        """Note a failure of this rank's own, which may be one too many."""
        rank = self._membership.rank if self._membership else 0
        # What serves makes no steps, so that it cannot end at the same one again and again.
        step = self.progress.step if self._config.mode != "Serve" else incarnation.attempt
        final = self.records.note(ended, rank, step, incarnation)
        if ended.code == ExitCode.CONFIGURATION:
            final = ended
        if final and not self.ended.done():
            self.ended.set_result(final)

    def _broke(self) -> None:
        """The group is over, if there was one."""
        if self.running and self._broke_at is None:
            self._broke_at = time.monotonic()
        if self.running:
            self.stoppable.clear()
        self.running = False

    def _cut(self) -> Cut | None:
        """Where the model was cut, if that was for the present shape."""
        cut, membership = self.keeper.memory.cut, self._membership
        assert membership
        same = cut and (cut.stages, cut.pipelines) == (membership.stages, membership.pipelines)
        return cut if same else None

    async def _can_start(self) -> bool:
        """Wait until the zygote is ready; note it as a failure if it cannot be."""
        try:
            await self._nursery.ready()
        except ZygoteDiedError:
            ended = Ending(1, "ZygoteDied", "the process that imports for the workers ended")
            self._crashed(ended, self.keeper.memory.incarnation)
            await asyncio.sleep(max(0.0, self.records.not_before - time.monotonic()))
            return False
        return True

    def _assignment(self, membership: Membership, plan: Plan) -> Assignment:
        settings, config, incarnation = self._settings, self._config, plan.incarnation
        return Assignment(
            membership=membership,
            config=config,
            attempt=incarnation.epoch * ATTEMPTS_PER_EPOCH + incarnation.attempt,
            checkpoint_directory=str(settings.checkpoint_directory) if config.checkpoint.volume_claim_name else "",
            scratch_directory=str(settings.scratch_directory),
            part=Part(
                incarnation=incarnation,
                rendezvous_port=plan.rendezvous_port,
                step=plan.step,
                cut=plan.cut,
                directory=str(settings.recovery_directory),
                memory_bytes=self.keeper.limit_bytes,
                pulse=str(settings.recovery_directory / _PULSE),
                addresses=(settings.address, plan.addresses[_next(membership)].host),
            ),
        )

    def _note_resumption(self, plan: Plan) -> None:
        step = plan.step or 0
        repeated = max(0, self.progress.step - step) if plan.step is not None else 0
        self.recovery = self.recovery.model_copy(update={"resumed_step": step, "steps_repeated": repeated})

    async def _fetch(self, plan: Plan, cut: Cut) -> None:
        """Own all pieces of the plan's step that this rank needs."""
        started = time.monotonic()
        try:
            await self.keeper.fetch(cut.needs())
        except TransferError as error:
            log.warning("pieces not fetched", error=str(error))
            if self._member:
                self._member.report(plan.incarnation, "Transfer", str(error), own=False)
        except ConfigurationError as error:
            self._worker_failed(Ending(1, "NoRoom", str(error)))
        else:
            log.info("pieces are here", step=plan.step, seconds=round(time.monotonic() - started, 3))
            self._charge.send(Fetched())

    def _close_listener(self) -> None:
        if self._listener:
            self._listener.close()
            self._listener = None


def _next(membership: Membership) -> int:
    """Rank of the stage behind this one, of stage 0 behind the last one."""
    return membership.pipeline * membership.stages + (membership.stage + 1) % membership.stages
