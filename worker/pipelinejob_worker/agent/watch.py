"""Watching a worker's signs of life: who is stopped or hangs is killed, who waits in vain has to leave."""

import asyncio
import time
from collections import deque
from collections.abc import Callable

from pipelinejob_worker.recovery.deadlines import SERVING_DEADLINE, Punctual, Verdict, judge, step_deadline
from pipelinejob_worker.recovery.pulse import Pulse, is_stopped

LOOK_SECONDS = 0.05
STEPS_KEPT = 10

WORDS: dict[Verdict, str] = {
    "Stopped": "the worker process was stopped by a signal",
    "Silent": "the worker process gave no sign of life",
    "Hung": "the worker computed for longer than a step may take",
    "Stuck": "the worker waited for other ranks for longer than a step may take",
}


class Watch:
    """The signs of life of one worker in one incarnation."""

    def __init__(self, pulse: Pulse, pid: int, configured_seconds: float) -> None:
        """``configured_seconds``: after how long a step hangs, 0 to measure.

        It is in force after the first step of training, or once the stage serves.
        """
        self._pulse = pulse
        self._pid = pid
        self._configured = configured_seconds
        self._steps: deque[float] = deque(maxlen=STEPS_KEPT)
        self._serves = False

    def step_finished(self, seconds: float | None) -> None:
        """Note how long steps take now."""
        if seconds is not None:
            self._steps.append(seconds)

    def serving(self) -> None:
        """The worker serves from now on: what it does takes no longer at first."""
        self._serves = True

    @property
    def deadline(self) -> float:
        """After how long a step hangs."""
        if self._serves:
            return self._configured or SERVING_DEADLINE
        return step_deadline(self._steps, self._configured if self._steps else 0)

    async def run(self, act: Callable[[Verdict], None]) -> None:
        """Look until cancelled; ``act`` on what is wrong, again and again as long as it is."""
        punctual = Punctual(LOOK_SECONDS)
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if punctual.fit_to_judge(time.monotonic()):
                verdict = judge(self._pulse.signs(), self.deadline, stopped=is_stopped(self._pid))
                if verdict:
                    act(verdict)
