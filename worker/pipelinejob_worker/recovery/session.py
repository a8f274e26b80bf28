"""A worker's part in the transaction that a step is: what it votes, and what it does after the vote.

For each step: forward and backward, ``ballot``, the vote, the update of the weights, ``after_update``.
"""

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from pipelinejob_worker.recovery.protection import Protection, decide

State = TypeVar("State")
State_contra = TypeVar("State_contra", contravariant=True)


class Snapshots(Protocol[State_contra]):
    """Takes snapshots in the background: ``tensors.Snapshots``."""

    def begin(self, step: int, state: State_contra, /) -> None:
        """Start to copy the state after ``step`` steps."""

    def wait(self) -> None:
        """Wait until the copy is valid. Raises what kept it from that."""


class Session(Generic[State]):
    """The snapshots of one rank in one incarnation. All ranks make the same decisions, as all see the same votes."""

    def __init__(
        self,
        snapshots: Snapshots[State],
        *,
        restored: int | None,
        interval: int,
        wait_guarded: Callable[[int, float], bool],
    ) -> None:
        """``restored``: the step of the plan, which this rank holds in its slots; None if the plan has none.

        ``wait_guarded``: waits until the guard holds a step, for so many seconds at most and not beyond the order to
        leave, and returns whether it does; always true where there is no guard.
        """
        self._snapshots = snapshots
        self._wait_guarded = wait_guarded
        self.protection = Protection(interval=interval, snapshot=restored)

    def ballot(self, step: int) -> tuple[float, float]:
        """Return what to vote in the vote that computes ``step``: not held here, not guarded.

        When it returns the tensors given to ``after_update`` may change. Raises what kept a snapshot from being taken:
        a rank without one has to leave, so that all go on from the step before.
        """
        self._snapshots.wait()
        newest = self.protection.snapshot
        if newest is None:
            return 0.0, 0.0
        return 0.0, float(not self._wait_guarded(newest, self.protection.wait_seconds(step)))

    def after_update(
        self, step: int, not_own: float, not_guarded: float, state: State, *, wanted: bool = False
    ) -> None:
        """Take a snapshot of the state after ``step`` steps, if it is due or ``wanted``, and that vote's sums allow it.

        The tensors in ``state`` must not change before the next ``ballot``.
        """
        self.protection, take = decide(self.protection, step, not_own, not_guarded, wanted=wanted)
        if take:
            self._snapshots.begin(step, state)
