"""What a stage tells while it trains: progress to its agent, steps to the log, and now and then a trace."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import structlog

from pipelinejob_worker.link import AgentLink, Reached
from pipelinejob_worker.pipeline.group import Group
from pipelinejob_worker.pipeline.timeline import Span
from pipelinejob_worker.pipeline.trace import chrome_trace, gather_spans
from pipelinejob_worker.protocol import TRACE_FILE, Progress, ProtectionStatus
from pipelinejob_worker.state.files import replace

log = structlog.get_logger()

REPORT_SECONDS = 0.1
LOG_SECONDS = 1.0
TRACE_SECONDS = 30.0


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

    def report(self, progress: Progress, protection: ProtectionStatus | None, *, now: bool) -> None:
        """Tell the agent."""
        if now or time.monotonic() - self._reported >= REPORT_SECONDS:
            self._reported = time.monotonic()
            self._link.send(Reached(progress=progress, protection=protection))

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


class Tracer:
    """Traces one step of all stages now and then; rank 0 keeps the newest trace where its agent serves it."""

    def __init__(self, group: Group, directory: Path | None) -> None:
        self._group = group
        self._directory = directory
        self._traced = float("-inf")
        self._steps = 0

    def wish(self) -> float:
        """Return 1 where the next step shall be traced, for all ranks to agree on; not the first, which sets up."""
        self._steps += 1
        due = time.monotonic() - self._traced >= TRACE_SECONDS
        return float(self._group.first and self._steps > 1 and due)

    def trace(self, step: int, spans: Sequence[Span]) -> None:
        """Keep the trace of the step that has just finished; collective."""
        self._traced = time.monotonic()
        ranks = gather_spans(self._group, spans)
        if self._group.first and self._directory:
            trace = chrome_trace(ranks, self._group.stages, step)
            try:
                replace(self._directory / TRACE_FILE, json.dumps(trace).encode())
            except OSError as error:
                log.warning("trace not written", error=str(error))
