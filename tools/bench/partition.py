"""Balanced against Even on uneven layers and an expensive head, predicted and measured: ``make bench-partition``.

Layers sleep for times of their own, so the number of cores does not matter.
"""

import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from pipelinejob_worker.models import Cost, ListModel
from pipelinejob_worker.pipeline.group import Group
from pipelinejob_worker.pipeline.schedule import build_schedule
from pipelinejob_worker.protocol import Data, Model, Partition, Preset, Schedule, Train, WorkerConfig
from pipelinejob_worker.train.loop import StageLoop
from pipelinejob_worker.train.plan import cut
from tools.bench.schedules import WIDTH, NoData
from tools.bench.stages import run_stages

STAGES, MICROBATCHES, STEPS = 4, 8, 2
MILLISECONDS = (1, 8, 8, 8, 16, 16, 8, 8, 8, 8, 24, 8, 8, 60)
"""Forward time of each layer; its backward pass takes twice as long."""


class SleepBackward(torch.autograd.Function):
    """Hands its input on; the backward pass sleeps."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, seconds: float) -> torch.Tensor:
        """Return the value."""
        ctx.seconds = seconds
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Sleep and return the gradient."""
        time.sleep(ctx.seconds)
        return gradient, None


class SleepingLayer(nn.Module):
    """Sleeps ``seconds`` forward and twice as long backward."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH))
        self._seconds = seconds

    def forward(self, hidden: torch.Tensor, _positions: torch.Tensor) -> torch.Tensor:
        """Run the layer."""
        time.sleep(self._seconds)
        if not hidden.is_floating_point():
            hidden = hidden[..., None].expand(*hidden.shape, WIDTH).float()
        result: torch.Tensor = SleepBackward.apply(hidden + self.weight, 2 * self._seconds)
        return result


class UnevenModel(ListModel):
    """One layer for each of ``MILLISECONDS``."""

    def __init__(self) -> None:
        self.names = tuple(f"layers.{index}" for index in range(len(MILLISECONDS)))
        self.costs = tuple(Cost(float(milliseconds), WIDTH) for milliseconds in MILLISECONDS)
        self.context, self.vocabulary, self.width = 2, WIDTH, WIDTH
        self.fingerprint = "uneven"

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Any number will do."""
        return logits.sum()

    def layer(self, index: int, seed: int) -> nn.Module:
        """Build one layer."""
        return SleepingLayer(MILLISECONDS[index] / 1000)


def measure(group: Group, cache: Path) -> dict[str, dict[str, Any]]:
    """Return for both strategies the layers of the stages, and predicted and measured seconds of a step."""
    results = {}
    for strategy in ("Even", "Balanced"):
        config = WorkerConfig(
            job="bench",
            job_uid="bench",
            model=Model(preset=Preset(name="gpt", layers=1, width=8, heads=1, context=2)),
            train=Train(
                data=Data(files=["none"]),
                steps=STEPS + 1,
                global_batch_size=MICROBATCHES,
                microbatches=MICROBATCHES,
                schedule=Schedule(name="1F1B"),
            ),
            partition=Partition(strategy=strategy),
        )
        model = UnevenModel()
        schedule = build_schedule("1F1B", group.stages, 1, MICROBATCHES)
        plan = cut(config, model, schedule, group, cache)
        loop = StageLoop(config.training, model, schedule, plan.chunks, corpus=NoData(), group=group)
        seconds = [loop.step(step).seconds for step in range(config.training.steps)]
        results[strategy] = {
            "layers": [plan.layers_of(stage) for stage in range(group.stages)],
            "predicted": plan.prediction.seconds,
            "measured": sum(seconds[1:]) / STEPS,
            "bubble": plan.prediction.bubble,
        }
    return results


def main() -> None:
    """Print the table and the JSON line."""
    with TemporaryDirectory() as cache:
        results = run_stages(STAGES, measure, Path(cache))[0]
    print(f"{'strategy':<10}{'layers of the stages':<28}{'predicted s':>12}{'measured s':>12}{'predicted bubble':>18}")
    for strategy, result in results.items():
        print(
            f"{strategy:<10}{', '.join(result['layers']):<28}{result['predicted']:>12.3f}{result['measured']:>12.3f}"
            f"{result['bubble']:>18.3f}"
        )
    ratios = {
        kind: results["Balanced"][kind] / results["Even"][kind]  # how far the step time falls
        for kind in ("predicted", "measured")
    }
    print(f"Balanced / Even: predicted {ratios['predicted']:.3f}, measured {ratios['measured']:.3f}")
    print(json.dumps({"partition": {kind: round(ratio, 4) for kind, ratio in ratios.items()}}))


if __name__ == "__main__":
    main()
