"""Measured bubble of every schedule beside its formula and beside torch's own schedules: ``make bench-schedules``.

Every part of a pass (forward, gradient of the input, gradient of the weights) sleeps for the same time, so the number
of cores does not matter: what is measured is the order of the passes and the cost of our loop.
"""

import json
import time
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

from pipelinejob_worker.data import Batch
from pipelinejob_worker.models import ListModel
from pipelinejob_worker.models.layered import Cost
from pipelinejob_worker.pipeline.group import Group
from pipelinejob_worker.pipeline.schedule import bubble_limit, build_schedule, place_chunks
from pipelinejob_worker.protocol import Data, Schedule, ScheduleName, Train
from pipelinejob_worker.train.loop import StageLoop
from pipelinejob_worker.train.progress import Expectation, Meter
from tools.bench.stages import run_stages

STAGES = 4
MICROBATCHES = (8, 16)
UNIT_SECONDS = 0.1
STEPS = 1
"""Measured after one that sets things up; sleeping does not vary."""
SCHEDULES: tuple[tuple[ScheduleName, int], ...] = (
    ("GPipe", 1),
    ("1F1B", 1),
    ("LoopedBFS", 2),
    ("Interleaved1F1B", 2),
    ("InterleavedZeroBubble", 1),
    ("InterleavedZeroBubble", 2),
    ("ZBVZeroBubble", 2),
    ("DualPipeV", 2),
)
WIDTH = 8


class SleepBackward(torch.autograd.Function):
    """Hands its input on; the backward pass sleeps for one unit."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        """Return the value."""
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """Sleep and return the gradient."""
        time.sleep(UNIT_SECONDS)
        return gradient.contiguous()  # that of a sum is not, and torch's schedules send it as it is


class SleepingLayer(nn.Module):
    """Three parts of equal length: forward, gradient of the input, gradient of the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH))
        self.start = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, hidden: torch.Tensor, _positions: torch.Tensor | None = None) -> torch.Tensor:
        """Run the layer; the first one gets token ids and takes a hidden state of its own instead."""
        time.sleep(UNIT_SECONDS)
        if not hidden.is_floating_point():
            hidden = self.start.expand(*hidden.shape, WIDTH)
        result: torch.Tensor = SleepBackward.apply(hidden) + SleepBackward.apply(self.weight)
        return result


class SleepingModel(ListModel):
    """One sleeping layer for each chunk."""

    def __init__(self, chunks: int) -> None:
        self.names = tuple(f"layers.{index}" for index in range(chunks))
        self.costs = tuple(Cost(1.0, 2 * WIDTH) for _ in self.names)
        self.context = 2
        self.vocabulary = WIDTH
        self.width = WIDTH
        self.fingerprint = "sleeping"

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Any number will do."""
        return logits.sum()

    def layer(self, index: int, seed: int) -> nn.Module:
        """Build one layer."""
        return SleepingLayer()


class NoData:
    """As many tokens as are asked for."""

    validation_samples = 0

    def samples(self, step: int, first: int, count: int) -> Batch:
        """Return zeros."""
        zeros = torch.zeros(count, 2, dtype=torch.int64)
        return Batch(zeros, zeros, None)

    def validation(self, first: int, count: int) -> Batch:
        """Return zeros."""
        return self.samples(0, first, count)

    def targets_in(self, step: int) -> int:
        """Return one: the loss does not matter."""
        return 1


def sleeping_loop(group: Group, name: ScheduleName, chunks: int, microbatches: int) -> tuple[StageLoop, Train]:
    """Return our loop over sleeping layers, and its settings."""
    train = Train(
        data=Data(files=["none"]),
        steps=STEPS + 1,
        global_batch_size=microbatches,
        microbatches=microbatches,
        schedule=Schedule(name=name, chunks_per_stage=chunks),
    )
    schedule = build_schedule(name, group.stages, chunks, microbatches)
    total = group.stages * chunks
    parts = [range(index, index + 1) for index in range(total)]
    return StageLoop(train, SleepingModel(total), schedule, parts, corpus=NoData(), group=group), train


def ours(group: Group, name: ScheduleName, chunks: int, microbatches: int) -> float:
    """Return the bubble that our loop reports after some steps."""
    loop, train = sleeping_loop(group, name, chunks, microbatches)
    limit = bubble_limit(name, group.stages, chunks, microbatches)
    meter = Meter(Expectation(train.steps, 1, 1.0, None, ["0"] * group.stages, limit, 1.0, limit))
    for step in range(train.steps):
        meter.step_finished(loop.step(step))
    bubble = meter.progress(train.steps).bubble_percent
    assert bubble is not None
    return bubble / 100


def plain_torch(group: Group, name: ScheduleName, chunks: int, microbatches: int) -> float:
    """Return the bubble of torch's own schedule, from the time of its steps."""
    owner = place_chunks(name, group.stages, chunks)
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    hidden = torch.zeros(1, 2, WIDTH, requires_grad=True)
    stages = [
        PipelineStage(
            SleepingLayer(),
            index,
            len(owner),
            group.device,
            input_args=(hidden if index else tokens,),
            output_args=(hidden,),
        )
        for index, stage in enumerate(owner)
        if stage == group.stage
    ]
    kind: Any = get_schedule_class(name)
    several = issubclass(kind, PipelineScheduleMulti)
    runner = kind(stages if several else stages[0], microbatches, loss_fn=lambda output, _: output.sum())
    all_tokens = torch.zeros(microbatches, 2, dtype=torch.int64)
    seconds = []
    for _ in range(STEPS + 1):
        distributed.barrier()
        started = time.perf_counter()
        runner.step(*([all_tokens] if owner[0] == group.stage else []), target=all_tokens)
        distributed.barrier()
        seconds.append(time.perf_counter() - started)
    busy = 3 * UNIT_SECONDS * microbatches * chunks
    return 1 - busy / (sum(seconds[1:]) / STEPS)


def measure(group: Group) -> list[dict[str, Any]]:
    """Measure all schedules on both sides in turn; stage 0 prints each line of the table as soon as it is known."""
    rows = []
    for microbatches in MICROBATCHES:
        for name, chunks in SCHEDULES:
            limit = bubble_limit(name, group.stages, chunks, microbatches)
            bubble = ours(group, name, chunks, microbatches)
            plain = plain_torch(group, name, chunks, microbatches)
            if group.first:
                print(f"{name:<23}{chunks:>7}{microbatches:>14}{limit:>9.3f}{bubble:>8.3f}{plain:>8.3f}", flush=True)
            rows.append(
                {"name": name, "chunks": chunks, "stages": group.stages, "microbatches": microbatches}
                | {"bubble": round(bubble, 4), "limit": round(limit, 4), "torch": round(plain, 4)}
            )
    return rows


def main() -> None:
    """Print the table and the JSON line."""
    print(f"{STAGES} stages, {1000 * UNIT_SECONDS:.0f} ms a part of a pass; idle share of the stages\n")
    print(f"{'schedule':<23}{'chunks':>7}{'microbatches':>14}{'formula':>9}{'ours':>8}{'torch':>8}", flush=True)
    rows = run_stages(STAGES, measure)[0]
    print(json.dumps({"schedules": rows}))


if __name__ == "__main__":
    main()
