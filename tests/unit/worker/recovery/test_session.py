"""Two ranks that vote and take snapshots: neither overwrites what the other may still need."""

from collections.abc import Mapping
from pathlib import Path

import torch

from pipelinejob_worker.recovery.pieces import Piece
from pipelinejob_worker.recovery.session import Session
from pipelinejob_worker.recovery.tensors import Snapshots, load
from pipelinejob_worker.state.layout import Tensors
from tests.unit.worker.recovery.snapshots import FIRST, store_in


class Rank:
    """A rank whose state after n steps is n, and whose guard answers when the test wants it to."""

    def __init__(self, directory: Path, restored: int | None = None) -> None:
        self.store = store_in(directory)
        self.weight = torch.zeros(3)
        self.valid: list[int] = []
        self.guarded = 0
        self.waited: list[float] = []
        self.snapshots = Snapshots(self.store, FIRST, 1, self.state(), self.valid.append)
        self.session: Session[Mapping[Piece, Tensors]] = Session(
            self.snapshots, restored=restored, interval=1, wait_guarded=self._wait_guarded
        )

    def state(self) -> dict[Piece, dict[str, torch.Tensor]]:
        return {Piece(0): {"weight.a": self.weight}}

    def _wait_guarded(self, step: int, seconds: float) -> bool:
        self.waited.append(seconds)
        return self.guarded >= step

    def steps(self) -> list[int]:
        return [held.step for held in self.store.held()]


def run_step(step: int, *ranks: Rank) -> None:
    ballots = [rank.session.ballot(step) for rank in ranks]
    sums = [sum(column) for column in zip(*ballots, strict=True)]
    for rank in ranks:
        rank.weight.fill_(step)
        rank.session.after_update(step, sums[0], sums[1], rank.state())


def test_snapshots_follow_the_votes(memory: Path) -> None:
    ranks = [Rank(memory / "0"), Rank(memory / "1")]
    for step in (1, 2, 3):
        run_step(step, *ranks)
        for rank in ranks:
            rank.guarded = step
    run_step(4, *ranks)
    ranks[0].guarded = 4  # the other's guard is late
    run_step(5, *ranks)
    run_step(6, *ranks)
    for rank in ranks:
        rank.snapshots.wait()
        assert rank.valid == [1, 2, 3, 4]
        assert rank.steps() == [3, 4]
        assert rank.session.protection.steps_at_risk(6) == 3
        assert load(rank.store, Piece(0), 4)["weight.a"].tolist() == [4.0] * 3
    ranks[1].guarded = 4
    run_step(7, *ranks)
    for rank in ranks:
        rank.snapshots.close()
        assert rank.steps() == [4, 7]
        assert rank.session.protection.steps_at_risk(7) == 3
    assert ranks[1].waited[-3:] == [2.0, 0.0, 0.0], "the first vote that is denied has waited, the others have not"


def test_after_a_recovery_nothing_is_overwritten_before_the_restored_step_is_guarded_again(memory: Path) -> None:
    rank = Rank(memory)
    for step in (1, 2):
        run_step(step, rank)
        rank.guarded = step
    rank.snapshots.close()
    restored = Rank(memory, restored=2)
    run_step(3, restored)
    restored.snapshots.wait()
    assert restored.steps() == [1, 2]
    restored.guarded = 2
    run_step(4, restored)
    restored.snapshots.close()
    assert restored.steps() == [2, 4]
