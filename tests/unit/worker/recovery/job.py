"""A job whose agents are real but for their workers: these train by arithmetic, in the test's own process.

What the state after a step is depends on all steps before, so a step that is left out, computed twice or mixed from two
histories shows in every later one.
"""

import asyncio
import json
import zlib
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pipelinejob_worker.recovery.coordination import CoordinatorServer, Member
from pipelinejob_worker.recovery.incarnation import Coordinator
from pipelinejob_worker.recovery.keeper import Keeper
from pipelinejob_worker.recovery.messages import Join, Plan
from pipelinejob_worker.recovery.pieces import Held, Incarnation, Piece
from pipelinejob_worker.recovery.protection import Protection, decide
from pipelinejob_worker.recovery.transport import Address, TransferError

LAYERS = 8
PIECE_BYTES = 3000
STEP_SECONDS = 0.002
HOST = "127.0.0.1"

Hook = Callable[[int, str, str, bool], None]
"""Told of each message: rank, "up" or "down", kind, and whether it has been forwarded already."""


def state_after(step: int) -> int:
    """The state of an undisturbed run."""
    value = 0
    for number in range(1, step + 1):
        value = next_state(value, number)
    return value


def next_state(value: int, step: int) -> int:
    return zlib.crc32(f"{value} {step}".encode())


class Group:
    """The process group of an incarnation: what a rank votes, all that finish see."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._votes: dict[int, dict[int, tuple[bool, bool]]] = defaultdict(dict)
        self._complete: dict[int, asyncio.Event] = defaultdict(asyncio.Event)

    async def vote(self, rank: int, step: int, ballot: tuple[bool, bool]) -> tuple[int, int]:
        self._votes[step][rank] = ballot
        if len(self._votes[step]) == self._size:
            self._complete[step].set()
        await self._complete[step].wait()
        ballots = self._votes[step].values()
        return sum(ballot[0] for ballot in ballots), sum(ballot[1] for ballot in ballots)


class Relay:
    """Carries the lines between a member and its coordinator, tells of them, and can be cut both ways."""

    def __init__(self, rank: int, target: Address, hook: Hook) -> None:
        self._rank = rank
        self._target = target
        self._hook = hook
        self._tasks: set[asyncio.Task[None]] = set()
        self.open = asyncio.Event()
        """While it is not set nothing is carried, as on a network that is cut."""

        self.open.set()

    async def start(self) -> Address:
        self._server = await asyncio.start_server(self._accept, HOST, 0, limit=1 << 24)
        return Address(HOST, self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._relay(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there_reader, there = await asyncio.open_connection(*self._target, limit=1 << 24)
        except OSError:
            writer.transport.abort()
            return
        ways = [
            asyncio.create_task(self._carry(reader, there, "up")),
            asyncio.create_task(self._carry(there_reader, writer, "down")),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            writer.transport.abort()
            there.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: str) -> None:
        with suppress(OSError):
            while line := await reader.readline():
                kind = json.loads(line)["kind"]
                await self.open.wait()
                if kind != "beat":
                    self._hook(self._rank, direction, kind, False)
                writer.write(line)
                await writer.drain()
                if kind != "beat":
                    self._hook(self._rank, direction, kind, True)


class Agent:
    """The agent of one rank."""

    def __init__(self, job: "Job", rank: int, directory: Path, node: str) -> None:
        self.job = job
        self.rank = rank
        self.directory = directory
        self.node = node
        self.relay: Relay | None = None
        self.plans: list[Plan] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._server: CoordinatorServer | None = None
        self._worker: asyncio.Task[None] | None = None
        self._guarded = asyncio.Condition()
        self._guarded_step: int | None = None
        self.keeper = Keeper(directory, job_uid="uid-1", rank=rank, limit_bytes=1 << 30, guarded=self._note_guarded)
        self.address = Address(HOST, 0)

    async def begin(self, epoch: int) -> None:
        """Obey a membership: with the coordinator of this epoch, as one of the job's ranks."""
        self.epoch = epoch
        self.world_size = len(self.job.layers_of)
        self.leaving = self.job.leaving
        if not self.address.port:
            self.address = Address(HOST, self.keeper.start(HOST))
        if self.rank == 0:
            coordinator = Coordinator("uid-1", epoch, self.world_size, lambda _: 29500)
            self._server = CoordinatorServer(coordinator)
            self.job.coordinator = Address(HOST, self._server.start(HOST, self.job.coordinator.port))
        self.relay = Relay(self.rank, self.job.coordinator, self.job.note_message)
        self.member = Member(self, await self.relay.start())
        self._tasks = [asyncio.create_task(self.member.run())]

    async def end(self) -> None:
        """Stop obeying: the epoch is over, or the agent dies; its connections end, whatever they carried."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        await self._stop_worker()
        if self._server:
            await self._server.stop()
            self._server = None
        if self.relay:
            await self.relay.stop()

    async def die(self) -> None:
        """End, with all that is not in memory that outlives the agent."""
        await self.end()
        await self.keeper.stop()

    def crash_worker(self) -> None:
        """The worker ends by its own fault."""
        assert self._worker
        self._worker.cancel()
        self.member.report(self.plans[-1].incarnation, "Signal", "killed", own=True)

    # What the coordinator has it do

    async def join(self) -> Join:
        return self.keeper.join(
            epoch=self.epoch, world_size=self.world_size, leaving=self.leaving, node=self.node, address=self.address
        )

    async def apply(self, plan: Plan) -> None:
        await self.keeper.apply(plan)
        self.plans.append(plan)
        self.job.note_plan(plan)

    async def start(self, plan: Plan) -> None:
        if self.rank >= self.world_size:
            return
        self._guarded_step = None
        self._worker = asyncio.create_task(self._work(plan))

    async def abort(self, incarnation: Incarnation, reason: str) -> None:
        await self._stop_worker()
        await self.keeper.leave()
        self.job.notify_moved()

    async def _stop_worker(self) -> None:
        if self._worker:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)

    # What its worker does

    async def _work(self, plan: Plan) -> None:
        try:
            await self._train(plan)
        except TransferError as error:
            self.member.report(plan.incarnation, "Transfer", str(error), own=False)
        except Exception as error:
            self.job.errors.append(error)
            raise

    async def _train(self, plan: Plan) -> None:
        needs = dict(enumerate(self.job.layers_of))
        pieces = [Piece(layer) for layer in needs[self.rank]]
        value, step, protection = 0, 0, Protection()
        if plan.step is not None:
            await self.keeper.fetch(needs)
            step, protection = plan.step, Protection(snapshot=plan.step)
            values = {int(self._content(piece, step).split()[0]) for piece in pieces}
            assert len(values) == 1, "pieces of one history"
            (value,) = values
        self.keeper.store.reserve(dict.fromkeys(pieces, PIECE_BYTES), copied=False)
        if plan.step is not None:
            self.keeper.protect(step)
        group = self.job.group(plan.incarnation)
        while step < self.job.last_step:
            await self.job.until_released(step)
            step += 1
            await asyncio.sleep(STEP_SECONDS)
            if protection.due(step) and protection.snapshot is not None:
                await self._until_guarded(protection.snapshot)
            not_guarded = protection.snapshot is not None and self._guarded_step != protection.snapshot
            protection, take = decide(protection, step, *await group.vote(self.rank, step, (False, not_guarded)))
            value = next_state(value, step)
            self.job.note_step(self.rank, step, value)
            if take:
                for piece in pieces:
                    self._write(piece, step, plan.incarnation, value)
                    await asyncio.sleep(0)  # a kill fits between two layers
                self.keeper.protect(step)

    def _write(self, piece: Piece, step: int, written: Incarnation, value: int) -> None:
        held = Held(piece=piece, step=step, written=written, size=PIECE_BYTES, layers=LAYERS)
        writing = self.keeper.store.begin(held)
        writing.payload[:] = f"{value} {piece} ".encode().ljust(PIECE_BYTES, b".")
        writing.commit()

    def _content(self, piece: Piece, step: int) -> str:
        payload, _ = self.keeper.store.read(piece, step, copied=False)
        text = bytes(payload).decode()
        assert text.split()[1] == str(piece)
        return text

    def _note_guarded(self, step: int) -> None:
        self._guarded_step = step
        self.job.notify(self._guarded)

    async def _until_guarded(self, step: int) -> None:
        async with self._guarded:
            await self._guarded.wait_for(lambda: self._guarded_step == step)


class Job:
    """All agents of a job, and the operator's hand."""

    def __init__(self, directory: Path, ranks: int, last_step: int = 12) -> None:
        self.directory = directory
        self.last_step = last_step
        self.layers_of = split(ranks)
        self.coordinator = Address(HOST, 0)
        self.agents: list[Agent] = []
        self.hook: Hook = lambda *_: None
        self.hold_at = last_step
        """Workers do not go beyond this step."""

        self.epoch = 1
        self.leaving = 0
        self.values: dict[int, int] = {}
        self.committed = 0
        """The newest step that any rank has finished."""
        self.redone = 0
        """Most committed steps that a plan went back by."""
        self.finished: dict[int, int] = {}
        self.errors: list[Exception] = []
        self._groups: dict[Incarnation, Group] = {}
        self._moved = asyncio.Condition()
        self._background: set[asyncio.Task[None]] = set()
        self._pods = 0

    async def begin(self) -> None:
        for rank in range(len(self.layers_of)):
            self.agents.append(self.new_agent(rank))
            await self.agents[rank].begin(self.epoch)

    def new_agent(self, rank: int, directory: Path | None = None) -> Agent:
        """An agent in a new pod, or with the memory of another one."""
        self._pods += 1
        return Agent(self, rank, directory or self.directory / f"pod-{self._pods}", f"node-{self._pods}")

    async def replace(self, rank: int, *, memory_lost: bool) -> None:
        """The agent dies with its worker; another takes its place, in the same pod or a new one."""
        old = self.agents[rank]
        await old.die()
        self.agents[rank] = self.new_agent(rank, None if memory_lost else old.directory)
        await self.agents[rank].begin(self.epoch)

    async def new_epoch(self, ranks: int) -> None:
        """What the operator does: another membership, with new pods for ranks beyond the present ones."""
        self.epoch += 1
        self.layers_of = split(ranks)
        self.leaving = max(0, len(self.agents) - ranks)
        self.coordinator = Address(HOST, 0)
        for agent in self.agents:
            await agent.end()
        self.agents += [self.new_agent(rank) for rank in range(len(self.agents), ranks)]
        self.finished.clear()
        for agent in self.agents:
            await agent.begin(self.epoch)

    async def dismiss(self) -> None:
        """The pods that leave are deleted."""
        for agent in self.agents[len(self.layers_of) :]:
            await agent.die()
        del self.agents[len(self.layers_of) :]

    async def stop(self) -> None:
        for agent in self.agents:
            await agent.die()
        await asyncio.gather(*self._background)

    async def until(self, what: Callable[[], bool]) -> None:
        """Wait for something that a step or a plan brings about."""
        async with asyncio.timeout(30), self._moved:
            await self._moved.wait_for(lambda: what() or bool(self.errors))
        assert not self.errors, self.errors

    async def until_held(self) -> None:
        """Wait until no rank goes further."""
        await self.until(lambda: all(self.finished.get(rank) == self.hold_at for rank in range(len(self.layers_of))))

    def release(self) -> None:
        """Let the workers train to the end."""
        self.hold_at = self.last_step
        self.notify(self._moved)

    async def until_released(self, step: int) -> None:
        await self.until(lambda: step < self.hold_at)

    async def until_step(self, step: int) -> None:
        await self.until(lambda: self.committed >= step)

    async def until_end(self) -> None:
        """Wait until every rank has finished the last step."""
        await self.until(lambda: all(self.finished.get(rank) == self.last_step for rank in range(len(self.layers_of))))

    @property
    def undisturbed(self) -> bool:
        """Whether all steps gave what an undisturbed run gives."""
        return self.values == {step: state_after(step) for step in range(1, self.last_step + 1)}

    def group(self, incarnation: Incarnation) -> Group:
        return self._groups.setdefault(incarnation, Group(len(self.layers_of)))

    def note_message(self, rank: int, direction: str, kind: str, forwarded: bool) -> None:
        self.hook(rank, direction, kind, forwarded)

    def note_step(self, rank: int, step: int, value: int) -> None:
        assert self.values.setdefault(step, value) == value, f"step {step} has two values"
        self.committed = max(self.committed, step)
        self.finished[rank] = step
        self.notify(self._moved)

    def note_plan(self, plan: Plan) -> None:
        self.redone = max(self.redone, self.committed - (plan.step or 0))
        self.notify(self._moved)

    def notify_moved(self) -> None:
        self.notify(self._moved)

    def notify(self, condition: asyncio.Condition) -> None:
        async def wake() -> None:
            async with condition:
                condition.notify_all()

        self.spawn(wake())

    def spawn(self, work) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def split(ranks: int) -> list[range]:
    """Equal shares of the layers."""
    return [range(LAYERS * rank // ranks, LAYERS * (rank + 1) // ranks) for rank in range(ranks)]
