"""What a stage tells while it trains: progress to its agent, and steps to the log."""

import time

import structlog

from pipelinejob_worker.link import AgentLink, Reached
from pipelinejob_worker.protocol import Progress

log = structlog.get_logger()

REPORT_SECONDS = 0.1
LOG_SECONDS = 1.0


class Reporter:
    """Sends progress at most ten times a second, and always what ``now`` marks.

    ``logs`` says which stage logs the steps: each step when no history file keeps them, else at most one a
    second.
    """

    def __init__(self, link: AgentLink, logs: bool, every_step: bool) -> None:
        self._link = link
        self._logs = logs
        self._log_seconds = 0.0 if every_step else LOG_SECONDS
        self._reported = self._logged = float("-inf")

    def report(self, progress: Progress, now: bool) -> None:
        """Tell the agent."""
        if now or time.monotonic() - self._reported >= REPORT_SECONDS:
            self._reported = time.monotonic()
            self._link.send(Reached(progress=progress))

    def log_step(self, progress: Progress, now: bool) -> None:
        """Log one line with the loss in full precision."""
        if self._logs and (now or time.monotonic() - self._logged >= self._log_seconds):
            self._logged = time.monotonic()
            log.info(
                "step",
                step=progress.step,
                total_steps=progress.total_steps,
                loss=progress.loss,
                tokens_per_second=progress.tokens_per_second,
                bubble_percent=progress.bubble_percent,
            )
