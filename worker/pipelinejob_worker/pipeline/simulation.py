"""How long a step takes when every pass's time is known. Pure."""

from collections.abc import Callable
from dataclasses import dataclass

from pipelinejob_worker.pipeline.schedule import Action, Pass, Schedule

Seconds = Callable[[Action], float]


@dataclass(frozen=True)
class Prediction:
    """What a step will take; ``bubble`` is the idle share of the stages, 0 to 1."""

    seconds: float
    bubble: float


def needs(action: Action, last_chunk: int) -> list[tuple[bool, int, int]]:
    """Return what must be finished before ``action``, as (is a backward, microbatch, chunk)."""
    _, microbatch, chunk = action
    match action.kind:
        case Pass.FORWARD:
            return [(False, microbatch, chunk - 1)] if chunk else []
        case Pass.WEIGHT:
            return [(True, microbatch, chunk)]
        case _:
            after = [(True, microbatch, chunk + 1)] if chunk < last_chunk else []
            return [(False, microbatch, chunk), *after]


def simulate(schedule: Schedule, seconds: Seconds) -> Prediction:
    """Run a step on paper: stages obey their order and messages take no time.

    Raises ValueError when the orders wait for each other.
    """
    last_chunk = len(schedule.stage_of) - 1
    finished: dict[tuple[bool, int, int], float] = {}
    clocks, busy = [0.0] * schedule.stages, 0.0
    positions = [0] * schedule.stages
    stages = set(range(schedule.stages))
    while stages:
        moved = False
        for stage in sorted(stages):
            order = schedule.orders[stage]
            while positions[stage] < len(order):
                action = order[positions[stage]]
                waits = needs(action, last_chunk)
                if any(need not in finished for need in waits):
                    break
                duration = seconds(action)
                clocks[stage] = max([clocks[stage], *(finished[need] for need in waits)]) + duration
                busy += duration
                if action.kind != Pass.WEIGHT:
                    finished[action.kind != Pass.FORWARD, action.microbatch, action.chunk] = clocks[stage]
                positions[stage] += 1
                moved = True
            if positions[stage] == len(order):
                stages.discard(stage)
        if stages and not moved:
            raise ValueError(f"schedule {schedule.name}: the orders of stages {sorted(stages)} wait for each other")
    total = max(clocks)
    return Prediction(total, 1 - busy / (schedule.stages * total) if total else 0.0)
