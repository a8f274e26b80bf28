"""Everything together: agents, forked workers that train over gloo, kills, freezes and lost pods. The bits decide."""

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from pipelinejob_worker.agent.zygote import ForkedWorker, Zygote
from pipelinejob_worker.recovery.coordination import CoordinatorServer, Member
from pipelinejob_worker.recovery.deadlines import judge
from pipelinejob_worker.recovery.incarnation import Coordinator
from pipelinejob_worker.recovery.keeper import Keeper
from pipelinejob_worker.recovery.messages import Join, Plan
from pipelinejob_worker.recovery.pieces import Incarnation
from pipelinejob_worker.recovery.pulse import Pulse, is_stopped
from pipelinejob_worker.recovery.transport import Address, TransferError
from tests.unit.worker.recovery.snapshots import LIMIT, until
from tests.unit.worker.recovery.test_zygote import ENVIRONMENT
from tests.unit.worker.recovery.trained import LAYERS, undisturbed

HOST = "127.0.0.1"
RANKS = 3
STEPS = 40
LEAVE_SECONDS = 1.0
SHARES = [range(LAYERS * rank // RANKS, LAYERS * (rank + 1) // RANKS) for rank in range(RANKS)]

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def zygote() -> AsyncIterator[Zygote]:
    zygote = await Zygote.start("tests.unit.worker.recovery.trained:work", ENVIRONMENT)
    await zygote.ready()
    yield zygote
    await zygote.stop()


class Job:
    """What the agents of the job have told the test."""

    def __init__(self, directory: Path, zygote: Zygote) -> None:
        self.directory = directory
        self.zygote = zygote
        self.coordinator = Address(HOST, 0)
        self.agents: list[Agent] = []
        self.losses: dict[int, str] = {}
        self.done: set[int] = set()
        self.pods = 0

    async def start_agent(self, rank: int, directory: Path | None = None) -> "Agent":
        self.pods += 1
        agent = Agent(self, rank, directory or self.directory / f"pod-{self.pods}")
        await agent.begin()
        return agent

    async def until_step(self, step: int) -> None:
        await until(lambda: len(self.losses) >= step)

    async def until_end(self) -> None:
        await until(lambda: len(self.done) == RANKS)


class Agent:
    """One rank's agent: a worker that outlives the loss of others, and is replaced when it ends itself."""

    def __init__(self, job: Job, rank: int, directory: Path) -> None:
        self.job = job
        self.rank = rank
        self.directory = directory
        self.keeper = Keeper(directory, job_uid="uid-1", rank=rank, limit_bytes=LIMIT, guarded=self._note_guarded)
        self.plans: list[Plan] = []
        self.worker: ForkedWorker | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._server: CoordinatorServer | None = None
        self._listener: socket.socket | None = None
        self._left = asyncio.Event()

    async def begin(self) -> None:
        self._address = Address(HOST, self.keeper.start(HOST))
        if self.rank == 0:
            self._server = CoordinatorServer(Coordinator("uid-1", 1, RANKS, self._listen))
            self.job.coordinator = Address(HOST, self._server.start(HOST, self.job.coordinator.port))
        self.member = Member(self, self.job.coordinator)
        self._tasks.append(asyncio.create_task(self.member.run()))

    async def die(self) -> None:
        """End with the worker and without a word."""
        for task in self._tasks:
            task.cancel()
        if self.worker:
            self.worker.send_signal(signal.SIGKILL)
            await self.worker.wait()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._server:
            await self._server.stop()
        await self.keeper.stop()

    async def join(self) -> Join:
        return self.keeper.join(epoch=1, world_size=RANKS, leaving=0, node=f"node-{self.rank}", address=self._address)

    async def apply(self, plan: Plan) -> None:
        await self.keeper.apply(plan)
        self.plans.append(plan)

    async def start(self, plan: Plan) -> None:
        self._pulse = Pulse.create(self.directory / "pulse")
        if self.worker is None or not self.worker.running:
            self._link, theirs = socket.socketpair()
            self._link.setblocking(False)
            with theirs:
                self.worker = await self.job.zygote.fork(theirs, 2)
            self._tasks.append(asyncio.create_task(self._listen_to(self.worker, self._link)))
            self._tasks.append(asyncio.create_task(self._watch(self.worker)))
        self._left.clear()
        part = {
            "rank": self.rank,
            "size": RANKS,
            "port": plan.rendezvous_port,
            "incarnation": plan.incarnation,
            "step": plan.step,
            "last_step": STEPS,
            "layers": list(SHARES[self.rank]),
            "directory": str(self.directory),
            "pulse": str(self.directory / "pulse"),
        }
        listener, self._listener = self._listener, None
        descriptors = [listener.fileno()] if listener else []
        socket.send_fds(self._link, [json.dumps({"plan": part}).encode() + b"\n"], descriptors)
        if listener:
            listener.close()

    async def abort(self, incarnation: Incarnation, reason: str) -> None:
        await self.keeper.leave()
        if self.worker is None or not self.worker.running:
            return
        self._pulse.order_to_leave()
        try:
            async with asyncio.timeout(LEAVE_SECONDS):
                await self._left.wait()
        except TimeoutError:
            self.worker.send_signal(signal.SIGKILL)
            await self.worker.wait()

    def _listen(self, incarnation: Incarnation) -> int:
        self._listener = socket.create_server((HOST, 0))
        port: int = self._listener.getsockname()[1]
        return port

    def _tell(self, **message: Any) -> None:
        with suppress(OSError):  # a worker that has just ended hears nothing
            self._link.send(json.dumps(message).encode() + b"\n")

    def _note_guarded(self, step: int) -> None:
        self._tell(guarded=step)

    async def _listen_to(self, worker: ForkedWorker, link: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=link)
        with suppress(ConnectionResetError):
            while line := await reader.readline():
                await self._note(json.loads(line))
        code = await worker.wait()
        writer.close()
        if code == 0:
            self.job.done.add(self.rank)
        else:
            self._left.set()
            self.member.report(self.plans[-1].incarnation, "Signal", f"exit code {code}", own=True)

    async def _note(self, message: dict[str, Any]) -> None:
        plan = self.plans[-1]
        match message:
            case {"joined": True}:
                try:
                    await self.keeper.fetch(dict(enumerate(SHARES)))
                    self._tell(fetched=True)
                except TransferError as error:
                    self.member.report(plan.incarnation, "Transfer", str(error), own=False)
            case {"valid": step}:
                if self.member.incarnation == plan.incarnation:
                    self.keeper.protect(step)
            case {"step": step, "loss": loss}:
                assert self.job.losses.setdefault(step, loss) == loss, f"step {step} has two losses"
            case {"left": True}:
                self._left.set()
                self.member.report(plan.incarnation, "PeerLost", "", own=False)

    async def _watch(self, worker: ForkedWorker) -> None:
        while worker.running:
            if judge(self._pulse.signs(), 10, stopped=is_stopped(worker.pid)):
                worker.send_signal(signal.SIGKILL)
            await asyncio.sleep(0.05)


@pytest_asyncio.fixture(loop_scope="module")
async def job(memory: Path, zygote: Zygote) -> AsyncIterator[Job]:
    job = Job(memory, zygote)
    job.agents = [await job.start_agent(rank) for rank in range(RANKS)]
    yield job
    for agent in job.agents:
        await agent.die()


def pids(job: Job) -> list[int]:
    return [agent.worker.pid for agent in job.agents if agent.worker]


async def recovered(job: Job, fault: str) -> None:
    """Wait until the job has ended; the losses are those of an undisturbed run, and the ranks went back one step."""
    started, reached = time.monotonic(), len(job.losses)

    def second_plans() -> list[Plan]:
        return [plan for agent in job.agents for plan in agent.plans if plan.incarnation == Incarnation(1, 2)]

    await until(lambda: len(second_plans()) == RANKS)
    planned = time.monotonic()
    await job.until_step(min(len(job.losses) + 1, STEPS))
    print(f"{fault}: plan after {planned - started:.3f} s, next step after {time.monotonic() - started:.3f} s")
    await job.until_end()
    assert [job.losses[step] for step in sorted(job.losses)] == undisturbed(STEPS)
    assert all((plan.step or 0) >= reached - 1 for plan in second_plans())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP])
@pytest.mark.parametrize("rank", range(RANKS))
async def test_a_worker_that_dies_or_hangs_is_replaced_and_the_others_keep_their_processes(
    job: Job, rank: int, number: signal.Signals
) -> None:
    await job.until_step(10)
    before = pids(job)
    os.kill(before[rank], number)
    await recovered(job, f"{number.name} of rank {rank}")
    kept = [one == other for one, other in zip(before, pids(job), strict=True)]
    assert kept == [other != rank for other in range(RANKS)]


@pytest.mark.parametrize("rank", range(RANKS))
async def test_a_lost_pod_is_replaced_from_its_copy_and_the_others_keep_their_processes(job: Job, rank: int) -> None:
    await job.until_step(10)
    before = pids(job)
    await job.agents[rank].die()
    job.agents[rank] = await job.start_agent(rank)
    await recovered(job, f"pod of rank {rank} lost")
    kept = [one == other for one, other in zip(before, pids(job), strict=True)]
    assert kept == [other != rank for other in range(RANKS)]
    assert job.agents[1].plans[-1].incarnation == Incarnation(1, 2), "one attempt was enough"
    fetched = [agent.keeper._client.traffic.received for agent in job.agents]
    assert [size > 0 for size in fetched] == [other == rank for other in range(RANKS)]


async def test_all_workers_at_once(job: Job) -> None:
    await job.until_step(10)
    for pid in pids(job):
        os.kill(pid, signal.SIGKILL)
    await recovered(job, "all workers")
