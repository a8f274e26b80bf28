"""Where a stage's time goes: every pass and every wait with its begin and end."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import NamedTuple

import torch


class Activity(StrEnum):
    """What a stage does; the first three are what a schedule counts as busy."""

    FORWARD = "forward"
    BACKWARD = "backward"
    WEIGHT = "weight"
    WAITING = "waiting"
    SENDING = "sending"
    UPDATE = "update"


BUSY = (Activity.FORWARD, Activity.BACKWARD, Activity.WEIGHT)
NOWHERE = -1
"""Microbatch and chunk of what belongs to none."""


class Span(NamedTuple):
    """An activity; ``start`` and ``end`` in seconds since the step's begin."""

    activity: Activity
    microbatch: int
    chunk: int
    start: float
    end: float


_Mark = float | torch.cuda.Event


class Timeline:
    """The spans of one step.

    On CUDA, which works behind the host's back, events mark begin and end; a wait for a message is the time that the
    device, not the host, stands still.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begin: _Mark = 0.0
        self._marks: list[tuple[Activity, int, int, _Mark, _Mark]] = []

    def begin_step(self) -> None:
        """Forget what was measured; times count from now."""
        self._marks.clear()
        self._begin = self._mark()

    @contextmanager
    def measure(self, activity: Activity, microbatch: int = NOWHERE, chunk: int = NOWHERE) -> Iterator[None]:
        """Measure the block."""
        start = self._mark()
        yield
        self._marks.append((activity, microbatch, chunk, start, self._mark()))

    def spans(self) -> list[Span]:
        """Return what was measured since the step's begin, in its order; waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return [
            Span(activity, microbatch, chunk, self._since(start), self._since(end))
            for activity, microbatch, chunk, start, end in self._marks
        ]

    def seconds(self) -> dict[Activity, float]:
        """Return the time of each activity since the step's begin."""
        totals = dict.fromkeys(Activity, 0.0)
        for span in self.spans():
            totals[span.activity] += span.end - span.start
        return totals

    def _mark(self) -> _Mark:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _since(self, mark: _Mark) -> float:
        if isinstance(mark, torch.cuda.Event):
            assert isinstance(self._begin, torch.cuda.Event)
            milliseconds: float = self._begin.elapsed_time(mark)
            return milliseconds / 1000
        assert not isinstance(self._begin, torch.cuda.Event)
        return mark - self._begin
