"""Our loop beside the shortest torch script with the same model and schedule: ``make bench-overhead``.

A step of each in turn, in the same processes: the same step takes up to 17 % more processor time from one minute to the
next on a machine that is shared, and so it does for both. Memory is the largest resident set of processes of one side
alone, added up.
"""

import json
import resource
import statistics
import time
from collections.abc import Callable

import torch
from torch import distributed, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn import functional

from pipelinejob_worker.data import Batch
from pipelinejob_worker.models import model_of
from pipelinejob_worker.pipeline.group import Group
from pipelinejob_worker.pipeline.partition import balanced, static_costs
from pipelinejob_worker.pipeline.schedule import build_schedule
from pipelinejob_worker.protocol import Data, Model, Optimizer, Preset, Schedule, Train
from pipelinejob_worker.train.loop import StageLoop
from tools.bench.stages import run_stages

STAGES, MICROBATCHES, SAMPLES = 2, 8, 4
PAIRS, STEPS = 5, 5
WARM_UP_STEPS = 2
"""Not timed: memory is asked for the first time, of the optimizer too."""

MODEL = Model(preset=Preset(name="gpt", layers=8, width=256, heads=8, context=128))
TRAIN = Train(
    data=Data(files=["none"]),
    steps=WARM_UP_STEPS + PAIRS * STEPS,
    global_batch_size=MICROBATCHES * SAMPLES,
    microbatches=MICROBATCHES,
    schedule=Schedule(name="1F1B"),
    optimizer=Optimizer(learning_rate="3e-4", clip_norm="0"),
)


def batch(step: int, first: int, count: int) -> Batch:
    """Return the same random tokens for both sides."""
    generator = torch.Generator().manual_seed(1000 * step + first)
    tokens = torch.randint(0, 256, (count, 129), generator=generator)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None)


class RandomText:
    """What a loop reads instead of files."""

    validation_samples = 0
    samples = staticmethod(batch)

    def validation(self, first: int, count: int) -> Batch:
        """Return random tokens."""
        return batch(0, first, count)

    def targets_in(self, step: int) -> int:
        """Return the tokens of a step."""
        return TRAIN.global_batch_size * 128


def chunks() -> list[range]:
    """Return the layers of the stages."""
    return balanced(static_costs(model_of(MODEL), SAMPLES), list(range(STAGES)), [1.0] * STAGES).chunks


Step = Callable[[int], float | None]
"""Trains one step; returns the loss on the last stage."""


def ours(group: Group) -> Step:
    """Return a step of our loop."""
    schedule = build_schedule("1F1B", STAGES, 1, MICROBATCHES)
    loop = StageLoop(TRAIN, model_of(MODEL), schedule, chunks(), corpus=RandomText(), group=group)
    return lambda number: loop.step(number).loss


def plain_torch(group: Group) -> Step:
    """Return a step of torch alone."""
    built = model_of(MODEL).build(chunks()[group.stage], TRAIN.seed)
    positions = torch.arange(128).expand(SAMPLES, -1)

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(built.layers.values())

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                hidden = layer(hidden, positions)
            return hidden

    part = Part()
    hidden = torch.zeros(SAMPLES, 128, 256, requires_grad=True)
    first, last = group.stage == 0, group.stage == STAGES - 1
    stage = PipelineStage(
        part,
        group.stage,
        STAGES,
        group.device,
        input_args=(torch.zeros(SAMPLES, 128, dtype=torch.int64) if first else hidden,),
        output_args=(torch.zeros(SAMPLES, 128, 256, requires_grad=True),),
    )
    tokens_of_step = TRAIN.global_batch_size * 128

    def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / tokens_of_step

    schedule = Schedule1F1B(stage, MICROBATCHES, loss_fn=loss_of, scale_grads=False)
    matrices = [weight for weight in part.parameters() if weight.dim() > 1]
    others = [weight for weight in part.parameters() if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-4, foreach=False)

    def step(number: int) -> float | None:
        optimizer.zero_grad()
        data = batch(number, 0, TRAIN.global_batch_size)
        losses: list[torch.Tensor] = []
        schedule.step(
            *([data.tokens] if first else []),
            target=data.targets if last else None,
            losses=losses if last else None,
            return_outputs=False,
        )
        optimizer.step()
        return sum(loss.item() for loss in losses) if last else None

    return step


SIDES = {"ours": ours, "torch": plain_torch}


def seconds_in_turn(group: Group) -> dict[str, list[float]]:
    """Train with both sides, a step of each in turn; return the seconds of their steps after the warm-up."""
    steps = {name: side(group) for name, side in SIDES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(WARM_UP_STEPS + PAIRS * STEPS):
        for name in sorted(steps, reverse=bool(number % 2)):
            distributed.barrier()
            started = time.perf_counter()
            steps[name](number)
            distributed.barrier()
            seconds[name].append(time.perf_counter() - started)
    return {name: taken[WARM_UP_STEPS:] for name, taken in seconds.items()}


def largest_set(group: Group, name: str) -> float:
    """Train with one side alone; return the largest resident set in MiB."""
    step = SIDES[name](group)
    for number in range(WARM_UP_STEPS + STEPS):
        step(number)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Print each pair, and the JSON line."""
    print(f"{STAGES} stages, 1F1B, {MICROBATCHES} microbatches, {MODEL.to_json()}\n")
    seconds = run_stages(STAGES, seconds_in_turn)[0]  # between two barriers: the same on all stages
    print(f"{'pair':<6}{'ours s':>10}{'torch s':>10}{'ratio':>8}")
    ratios = []
    for pair in range(PAIRS):
        mine, its = (statistics.median(seconds[name][pair * STEPS : (pair + 1) * STEPS]) for name in SIDES)
        ratios.append(mine / its)
        print(f"{pair + 1:<6}{mine:>10.3f}{its:>10.3f}{ratios[-1]:>8.3f}")
    mine, its = (sum(run_stages(STAGES, largest_set, name)) for name in SIDES)
    print(f"{'MiB':<6}{mine:>10.0f}{its:>10.0f}{mine / its:>8.3f}")
    told = {"step_time_ratio": round(statistics.median(ratios), 4), "memory_ratio": round(mine / its, 4)}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
