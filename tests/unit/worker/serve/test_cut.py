"""All stages draw the same conclusion about what each serves, and what is loaded stays where it is."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.models import Cost, ListModel
from pipelinejob_worker.protocol import Partition
from pipelinejob_worker.serve.cut import Held, Offer, agree, cut

LAYERS = 8


def held(*starts: int, step: int = 0) -> Held:
    return Held(layers=LAYERS, starts=starts, step=step)


NEW = Offer()


@pytest.mark.parametrize(
    ("offers", "wanted", "expected"),
    [
        pytest.param([NEW, NEW], 0, (None, 0), id="nobody has anything"),
        pytest.param([Offer(held=held(0, 3)), NEW], 0, (held(0, 3), 0), id="one is new"),
        pytest.param([NEW, Offer(held=held(0, 3)), NEW], 0, (None, 0), id="another number of stages"),
        pytest.param(
            [Offer(held=held(0, 4)), Offer(held=held(0, 5, 6)), NEW],
            0,
            (held(0, 5, 6), 0),
            id="of another group",
        ),
        pytest.param([Offer(steps=(9, 6)), Offer(steps=(9, 6))], 0, (None, 9), id="the newest checkpoint"),
        pytest.param([Offer(steps=(9, 6)), Offer(steps=(6, 3))], 0, (None, 6), id="the newest that all see"),
        pytest.param([Offer(steps=(9, 6)), Offer(steps=(9, 6))], 6, (None, 6), id="the step that is wanted"),
        pytest.param(
            [Offer(held=held(0, 3, step=6), steps=(9, 6)), Offer(steps=(9, 6))],
            0,
            (held(0, 3, step=6), 6),
            id="what is loaded stays although there is a newer one",
        ),
        pytest.param(
            [Offer(held=held(0, 3, step=6), steps=(9,)), Offer(held=held(0, 3, step=6), steps=(9,))],
            0,
            (held(0, 3, step=6), 6),
            id="what all have loaded need not be there any more",
        ),
        pytest.param(
            [Offer(held=held(0, 3, step=6)), Offer(held=held(0, 3, step=6))],
            0,
            (held(0, 3, step=6), 6),
            id="nor any other",
        ),
        pytest.param(
            [Offer(held=held(0, 3, step=6), steps=(9,)), Offer(steps=(9,))],
            0,
            (held(0, 3, step=6), 9),
            id="who is new cannot load what has been deleted, but the cut stays",
        ),
    ],
)
def test_agreement(offers: list[Offer], wanted: int, expected: tuple[Held | None, int]) -> None:
    assert agree(offers, wanted) == expected


@pytest.mark.parametrize(
    ("offers", "wanted", "problem"),
    [
        ([Offer(steps=(9,)), Offer(steps=(9, 6))], 6, "no checkpoint of step 6 in common; allowed: 9"),
        ([Offer(steps=(9,)), Offer(steps=(6,))], 0, "no checkpoint in common; allowed: a claim"),
    ],
)
def test_a_checkpoint_that_not_all_see_is_named(offers: list[Offer], wanted: int, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        agree(offers, wanted)


MILLISECONDS = [1, 4, 4, 4, 4, 4, 4, 16]


class Sleeping(nn.Module):
    """A layer that takes a given time."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return hidden


class Uneven(ListModel):
    """A model whose head is as dear as four layers."""

    def __init__(self, slowness: float = 1.0) -> None:
        self.names = tuple(f"layers.{index}" for index in range(LAYERS))
        self.costs = tuple(Cost(float(each), 1) for each in MILLISECONDS)
        self.context, self.vocabulary, self.width, self.fingerprint = 8, 8, 8, "uneven"
        self._slowness = slowness

    def layer(self, index: int, seed: int) -> nn.Module:
        return Sleeping(self._slowness * MILLISECONDS[index] / 1000)


def cut_by(slownesses: list[float], partition: Partition) -> list[list[range]]:
    """The cut that each of some stages arrives at."""
    stages = len(slownesses)
    barrier = threading.Barrier(stages, timeout=20)
    notes: list[Any] = [None] * stages

    def work(stage: int) -> list[range]:
        def exchange(note: dict[str, Any]) -> list[dict[str, Any]]:
            notes[stage] = note
            barrier.wait()
            heard = list(notes)
            barrier.wait()
            return heard

        return cut(Uneven(slownesses[stage]), partition, stages, torch.device("cpu"), exchange)

    with ThreadPoolExecutor(stages) as pool:
        return list(pool.map(work, range(stages)))


def test_a_balanced_cut_follows_from_forward_passes_and_is_the_same_on_all_stages() -> None:
    found = cut_by([1.0, 1.0, 1.0], Partition())
    assert found == [[range(4), range(4, 7), range(7, 8)]] * 3


def test_a_slow_stage_gets_fewer_layers() -> None:
    found = cut_by([1.0, 4.0, 1.0], Partition())
    assert found[0] == found[1] == found[2]
    assert len(found[0][1]) == 1


def test_a_memory_limit_counts_weights_alone() -> None:
    model = Uneven()
    model.costs = tuple(Cost(1.0, 1 << 20) for _ in MILLISECONDS)  # 4 MiB each

    def alone(note: dict[str, Any]) -> list[dict[str, Any]]:
        return [note, note]

    found = cut(model, Partition(memoryLimitMiB=16), 2, torch.device("cpu"), alone)
    assert [len(part) for part in found] == [4, 4], "also if others would take equally long"
    with pytest.raises(ConfigurationError, match=r"spec\.partition\.memoryLimitMiB"):
        cut(model, Partition(memoryLimitMiB=15), 2, torch.device("cpu"), alone)
