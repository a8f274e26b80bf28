"""The worker in an agent's charge: forked when there is none, watched while it is in a group, made to leave it."""

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from pipelinejob_worker.agent import ending
from pipelinejob_worker.agent.ending import Ending
from pipelinejob_worker.agent.records import oom_kills
from pipelinejob_worker.agent.tasks import Tasks
from pipelinejob_worker.agent.watch import WORDS, Watch
from pipelinejob_worker.agent.worker_process import Nursery, WorkerProcess
from pipelinejob_worker.link import Assignment, Drain, Event, Failed, Order
from pipelinejob_worker.protocol import ExitCode, Progress
from pipelinejob_worker.recovery.deadlines import Verdict
from pipelinejob_worker.recovery.pulse import Doing, Pulse

log = structlog.get_logger()

LEAVE_SECONDS = 4.0
"""How long a worker may wait for others after the order to leave, which ends its waits; then it is killed."""

LOOK_SECONDS = 0.02


class Charge:
    """At most one worker, which outlives the groups that it is in."""

    def __init__(
        self,
        nursery: Nursery,
        tasks: Tasks,
        hear: Callable[[Event], None],
        failed: Callable[[Ending], None],
        stuck: Callable[[str], None],
    ) -> None:
        """``hear``: what the worker tells. ``failed``: it has ended by its own fault, and how. ``stuck``: it waits."""
        self._nursery = nursery
        self._tasks = tasks
        self._hear = hear
        self._failed = failed
        self._stuck = stuck
        self._worker: WorkerProcess | None = None
        self._pulse: Pulse | None = None
        self._watch: Watch | None = None
        self._out = asyncio.Event()
        self._out.set()
        self._failure: Failed | None = None
        self._verdict: Verdict | None = None
        self._ordered_kill = False
        self._oom_kills = 0

    @property
    def in_group(self) -> bool:
        """Whether the worker is in a group, or about to join one."""
        return not self._out.is_set()

    async def ensure(self) -> bool:
        """Have a worker; return whether it is a new one. Raises ZygoteDiedError and OSError."""
        if self._worker and self._worker.running:
            return False
        self._oom_kills = oom_kills()
        self._ordered_kill = False
        worker = self._worker = await self._nursery.start()
        self._tasks.spawn(f"worker {worker.pid}", self._listen(worker))
        return True

    def take_part(
        self, assignment: Assignment, descriptors: Sequence[int], pulse_file: Path, hang_seconds: float
    ) -> None:
        """Have the worker join a group, and watch it; its signs of life are in ``pulse_file``. Raises OSError."""
        worker = self._worker
        assert worker
        self._pulse = Pulse.create(pulse_file)
        self._failure = self._verdict = None
        self._out.clear()
        worker.send(assignment, descriptors)
        self._watch = Watch(self._pulse, worker.pid, hang_seconds)
        self._tasks.spawn("watch", self._watch.run(lambda verdict: self._judged(worker, verdict)))

    def send(self, order: Order) -> None:
        """Tell the worker something about the group that it is in, if it is in one."""
        if self._worker and self.in_group:
            self._worker.send(order)

    def note_out(self) -> None:
        """The worker has told that it is in no group any more."""
        self._out.set()

    def note_progress(self, progress: Progress) -> None:
        """The worker has told how long its steps take, or that it serves."""
        if self._watch and progress.serving:
            self._watch.serving()
        elif self._watch:
            self._watch.step_finished(progress.step_seconds)

    async def pause(self, drain: Drain, seconds: float) -> bool:
        """Have all ranks leave at a step boundary, if this one is in a group; return whether it has left in time."""
        self.send(drain)
        try:
            async with asyncio.timeout(seconds):
                await self._out.wait()
        except TimeoutError:
            return False
        return True

    async def leave(self) -> None:
        """Have the worker leave its group now, and return when it is out.

        One that waits for others in spite of the order is killed; one that computes comes round by itself, or is found
        to hang.
        """
        worker, pulse = self._worker, self._pulse
        if worker and pulse and self.in_group:
            pulse.order_to_leave()
            ordered = time.monotonic()
            while self.in_group:
                late = time.monotonic() - ordered > LEAVE_SECONDS
                if late and pulse.signs().doing == Doing.WAITING and worker.running and not self._ordered_kill:
                    log.warning("the worker does not leave its group, and is killed")
                    self._ordered_kill = True
                    worker.kill()
                await self._wait_out(LOOK_SECONDS)
        await self._tasks.stop("watch")

    async def _wait_out(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._out.wait()
        except TimeoutError:
            return

    async def _listen(self, worker: WorkerProcess) -> None:
        """Take in what the worker tells, until its end."""
        async for event in worker.events():
            if isinstance(event, Failed):
                self._failure = event
            else:
                self._hear(event)
        code = await worker.end()
        if worker is self._worker:
            self._worker = None
        self._out.set()
        if not self._ordered_kill:
            self._failed(self._cause(code))

    def _cause(self, code: int) -> Ending:
        """Why the worker has ended; none ends in order here, as the agent ends it with the zygote."""
        ended = ending.of_worker(code, self._failure, Progress())
        if self._verdict:
            return Ending(ended.code, self._verdict, f"{WORDS[self._verdict]}, and was killed")
        if ended.reason == "Signal" and oom_kills() > self._oom_kills:
            return Ending(ended.code, "OOMKilled", "the kernel killed the worker process: memory is out")
        if code in (ExitCode.SUCCEEDED, ExitCode.DRAINED):
            return Ending(1, "Error", f"the worker process exited with code {code} without having been asked to")
        return ended

    def _judged(self, worker: WorkerProcess, verdict: Verdict) -> None:
        """Something is wrong with the worker."""
        if not self.in_group:
            return
        if verdict == "Stuck":
            self._stuck(WORDS[verdict])
            return
        self._verdict = verdict
        worker.kill()
