"""Our loop beside the shortest torch script with the same model and schedule: ``make bench-overhead``.

Both run in turn, so that whatever else changes on the machine changes for both. Each run is a set of fresh processes;
memory is the largest resident set of each, added up.
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
PAIRS, STEPS = 5, 8
WARM_UP_STEPS = 2
"""Not timed: memory is asked for the first time, of the optimizer too."""

MODEL = Model(preset=Preset(name="gpt", layers=8, width=256, heads=8, context=128))
TRAIN = Train(
    data=Data(files=["none"]),
    steps=WARM_UP_STEPS + STEPS,
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


def timed(group: Group, step: Callable[[int], float | None]) -> tuple[float, float, float | None]:
    """Return the median time of a step after the warm-up, the largest resident set in MiB, and the last loss."""
    seconds, loss = [], None
    for number in range(WARM_UP_STEPS + STEPS):
        distributed.barrier()
        started = time.perf_counter()
        loss = step(number)
        distributed.barrier()
        seconds.append(time.perf_counter() - started)
    mebibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return statistics.median(seconds[WARM_UP_STEPS:]), mebibytes, loss


def ours(group: Group) -> tuple[float, float, float | None]:
    """Train with our loop."""
    schedule = build_schedule("1F1B", STAGES, 1, MICROBATCHES)
    loop = StageLoop(TRAIN, model_of(MODEL), schedule, chunks(), corpus=RandomText(), group=group)
    return timed(group, lambda number: loop.step(number).loss)


def plain_torch(group: Group) -> tuple[float, float, float | None]:
    """Train with torch alone."""
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

    return timed(group, step)


def main() -> None:
    """Print each pair, and the JSON line."""
    print(f"{STAGES} stages, 1F1B, {MICROBATCHES} microbatches, {MODEL.to_json()}\n")
    print(f"{'pair':<6}{'ours s':>10}{'torch s':>10}{'ratio':>8}{'ours MiB':>11}{'torch MiB':>11}{'ratio':>8}")
    times, memories = [], []
    for pair in range(PAIRS):
        sides = [ours, plain_torch] if pair % 2 == 0 else [plain_torch, ours]
        results = {side: run_stages(STAGES, side) for side in sides}
        seconds, memory = zip(*(_total(results[side]) for side in (ours, plain_torch)), strict=True)
        times.append(seconds[0] / seconds[1])
        memories.append(memory[0] / memory[1])
        print(
            f"{pair + 1:<6}{seconds[0]:>10.3f}{seconds[1]:>10.3f}{times[-1]:>8.3f}"
            f"{memory[0]:>11.0f}{memory[1]:>11.0f}{memories[-1]:>8.3f}",
            flush=True,
        )
    print(
        json.dumps(
            {
                "step_time_ratio": round(statistics.median(times), 4),
                "memory_ratio": round(statistics.median(memories), 4),
            }
        )
    )


def _total(stages: list[tuple[float, float, float | None]]) -> tuple[float, float]:
    return max(seconds for seconds, _, _ in stages), sum(mebibytes for _, mebibytes, _ in stages)


if __name__ == "__main__":
    main()
