"""When to take a snapshot, from what a vote has shown to all ranks. Pure, and so the same on every rank.

Every vote carries two numbers: how many ranks have not their newest snapshot in their own memory, and how many have it
not at their guard. If the second is 0, all ranks hold that step in both places and know it: an older one may be
overwritten. That is the whole commit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

PATIENCE_VOTES = 20
"""Votes in a row, with a snapshot due, after which copies are given up until all ranks are guarded again."""

GUARD_WAIT_SECONDS = 2.0
"""How long a vote waits for the guard where a snapshot is due."""

SHARE_OF_TIME = 0.03
"""Most that snapshots may cost, as a share of the training time."""


@dataclass(frozen=True)
class Protection:
    """What all ranks know about the snapshots."""

    interval: int = 1
    """Steps between two snapshots, if the copies keep up."""

    snapshot: int | None = None
    """Step of the newest snapshot, which the next vote is about; None before the first."""

    guarded: int | None = None
    """The newest step that every rank is known to hold in its own memory and at its guard; None if there is none."""

    denied: int = 0
    """Votes in a row at which a snapshot was due and not allowed."""

    @property
    def unprotected(self) -> bool:
        """Whether snapshots are taken without regard to copies: the loss of a node costs what a checkpoint costs."""
        return self.denied >= PATIENCE_VOTES

    def steps_at_risk(self, step: int) -> int:
        """Return how many of ``step`` finished steps the loss of a node would cost, with the one being computed."""
        return step - (self.guarded or 0)

    def wait_seconds(self, step: int) -> float:
        """Return how long the vote that computes ``step`` may wait for the guard; once in vain is enough."""
        return GUARD_WAIT_SECONDS if self.snapshot is not None and self.due(step) and not self.denied else 0.0

    def due(self, step: int) -> bool:
        """Whether the state after ``step`` steps should be kept."""
        return self.snapshot is None or step - self.snapshot >= self.interval


def decide(
    before: Protection, step: int, not_own: float, not_guarded: float, *, wanted: bool = False
) -> tuple[Protection, bool]:
    """Return what is known after the vote that computes ``step``, and whether to take a snapshot of its state.

    ``not_own``, ``not_guarded``: the vote's sums, about the snapshot ``before.snapshot``. ``wanted``: whether all want
    one though it may not be due.
    """
    after = before
    if before.snapshot is not None and not_own == 0 and not_guarded == 0:
        after = replace(before, guarded=before.snapshot, denied=0)
    if not before.due(step) and not wanted:
        return after, False
    if before.snapshot is None or after.guarded == before.snapshot:
        return replace(after, snapshot=step), True
    after = replace(after, denied=before.denied + 1)
    if after.unprotected and not_own == 0:
        return replace(after, snapshot=step, guarded=None), True  # it overwrites what was guarded
    return after, False


def interval(step_seconds: Sequence[float], snapshot_seconds: Sequence[float], copy_seconds: Sequence[float]) -> int:
    """Return the least number of steps between snapshots that keeps their cost within ``SHARE_OF_TIME``.

    Measured times of every rank, the same lists on all: of a step, of what a snapshot adds to it, and of sending the
    copy, which has to be done before the next one.
    """
    step = max(step_seconds)
    if step <= 0:
        return 1
    affordable = math.ceil(max(snapshot_seconds) / (SHARE_OF_TIME * step))
    return max(1, affordable, math.ceil(max(copy_seconds) / step))
