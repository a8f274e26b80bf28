"""The order in which each stage runs its forward and backward passes. Pure.

A model is cut into chunks; ``stage_of[chunk]`` places them on the stages. *Looped* placement visits the stages in
rounds: chunk ``c`` is on stage ``c % p``. *V* placement goes down the stages and back up, so that stage 0 has the
first and the last chunk. In every order each chunk's backward passes follow the order of the microbatches, so that
gradients are summed as a single process would do it.

Sources of the schedules: GPipe (Huang et al. 2019), 1F1B with a flush (Narayanan et al. 2021, section 2.2), looped
breadth-first (Lamy-Poirier 2023), interleaved 1F1B (Narayanan et al. 2021, section 2.3), zero bubble with split
backward passes and its V placement (Qi et al. 2024), DualPipeV (DeepSeek-AI 2025, halved by Qi et al.).
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.protocol import ScheduleName


class Pass(StrEnum):
    """What a stage computes for one microbatch of one chunk."""

    FORWARD = "F"
    BACKWARD = "B"
    INPUT = "I"
    """The part of a backward pass that the chunk before waits for: the gradient of the input."""
    WEIGHT = "W"
    """The rest of it: the gradients of the weights, which nobody waits for."""


class Action(NamedTuple):
    """One pass of one microbatch through one chunk."""

    kind: Pass
    microbatch: int
    chunk: int


Order = tuple[Action, ...]


@dataclass(frozen=True)
class Schedule:
    """What every stage does in one step."""

    name: ScheduleName
    stage_of: tuple[int, ...]
    """Stage of each chunk."""

    orders: tuple[Order, ...]
    """Actions of each stage, in the order in which it runs them."""

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.orders)

    @cached_property
    def index(self) -> tuple[frozenset[Action], ...]:
        """Actions of each stage, for looking one up."""
        return tuple(frozenset(order) for order in self.orders)

    def chunks_of(self, stage: int) -> tuple[int, ...]:
        """Chunks on a stage, first to last."""
        return tuple(chunk for chunk, owner in enumerate(self.stage_of) if owner == stage)

    def live_microbatches(self, stage: int) -> int:
        """Largest number of (microbatch, chunk) pairs whose activations the stage holds at a time."""
        live = most = 0
        for action in self.orders[stage]:
            live += {Pass.FORWARD: 1, Pass.BACKWARD: -1, Pass.WEIGHT: -1, Pass.INPUT: 0}[action.kind]
            most = max(most, live)
        return most


V_SHAPED = frozenset[ScheduleName](["ZBVZeroBubble", "DualPipeV"])
SPLITS_BACKWARD = frozenset[ScheduleName](["InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"])


def build_schedule(name: ScheduleName, stages: int, chunks_per_stage: int, microbatches: int) -> Schedule:
    """Return the schedule of one pipeline.

    Raises ConfigurationError when it does not exist for these numbers; the API server refuses the same.
    """
    check_schedule(name, stages, chunks_per_stage, microbatches)
    stage_of = place_chunks(name, stages, chunks_per_stage)
    build: dict[ScheduleName, Callable[[], list[Order]]] = {
        "GPipe": lambda: _breadth_first(stage_of, stages, microbatches),
        "1F1B": lambda: _interleaved(stages, 1, microbatches, Pass.BACKWARD, slack=1),
        "LoopedBFS": lambda: _breadth_first(stage_of, stages, microbatches),
        # Twice the shortest warm-up hides the messages behind other microbatches.
        "Interleaved1F1B": lambda: _interleaved(stages, chunks_per_stage, microbatches, Pass.BACKWARD, slack=2),
        "InterleavedZeroBubble": lambda: _fill_with_weights(
            _interleaved(stages, chunks_per_stage, microbatches, Pass.INPUT, slack=1), stage_of, len(stage_of)
        ),
        "ZBVZeroBubble": lambda: _zero_bubble_v(stage_of, stages, microbatches),
        "DualPipeV": lambda: [_dual_pipe_v(stage, stages, microbatches) for stage in range(stages)],
    }
    return Schedule(name, stage_of, tuple(build[name]()))


def check_schedule(name: ScheduleName, stages: int, chunks_per_stage: int, microbatches: int) -> None:
    """Raise ConfigurationError unless the schedule exists; ``microbatches`` are those of one pipeline."""
    chunks = {"GPipe": {1}, "1F1B": {1}, "ZBVZeroBubble": {2}, "DualPipeV": {2}}.get(name, {chunks_per_stage})
    if chunks_per_stage not in chunks:
        raise ConfigurationError(
            f"spec.train.schedule.chunksPerStage: {chunks_per_stage} does not fit schedule {name}; allowed: "
            f"{chunks.pop()}"
        )
    least = {"1F1B": stages, "DualPipeV": 2 * stages}.get(name, 1)
    if microbatches < least:
        raise ConfigurationError(
            f"spec.train.microbatches: {microbatches} a pipeline is too few for schedule {name} on {stages} stages; "
            f"allowed: {least} or more, or another schedule"
        )
    if name in ("Interleaved1F1B", "InterleavedZeroBubble") and microbatches % stages:
        raise ConfigurationError(
            f"spec.train.microbatches: {microbatches} a pipeline is not a multiple of the {stages} stages, which "
            f"schedule {name} visits in rounds; allowed: a multiple, or schedule LoopedBFS"
        )


def place_chunks(name: ScheduleName, stages: int, chunks_per_stage: int) -> tuple[int, ...]:
    """Return the stage of each chunk."""
    if name in V_SHAPED:
        return (*range(stages), *reversed(range(stages)))
    return tuple(chunk % stages for chunk in range(stages * chunks_per_stage))


def forward_schedule(schedule: Schedule, microbatches: int) -> Schedule:
    """Return the same chunks on the same stages, for forward passes only."""
    orders = _breadth_first(schedule.stage_of, schedule.stages, microbatches)
    return Schedule(
        schedule.name,
        schedule.stage_of,
        tuple(tuple(action for action in order if action.kind == Pass.FORWARD) for order in orders),
    )


def bubble_limit(name: ScheduleName, stages: int, chunks_per_stage: int, microbatches: int) -> float:
    """Smallest idle share of the stages, 0 to 1, when all chunks are equally fast and messages take no time.

    With p stages, m microbatches and v chunks a stage, and, where backward passes are split, equal times of all three
    parts: ``(p - 1) / (k + p - 1)`` with ``k = m`` for GPipe and 1F1B, ``v m`` for the looped schedules, ``3 v m`` for
    those that split the backward (Narayanan et al. 2021; Qi et al. 2024).
    """
    slots = microbatches * chunks_per_stage * (3 if name in SPLITS_BACKWARD else 1)
    return (stages - 1) / (slots + stages - 1)


def _breadth_first(stage_of: Sequence[int], stages: int, microbatches: int) -> list[Order]:
    """All forwards of a chunk, then those of the next one; backwards likewise, from the last chunk on."""
    orders = []
    for stage in range(stages):
        chunks = [chunk for chunk, owner in enumerate(stage_of) if owner == stage]
        forwards = [Action(Pass.FORWARD, m, chunk) for chunk in chunks for m in range(microbatches)]
        backwards = [Action(Pass.BACKWARD, m, chunk) for chunk in reversed(chunks) for m in range(microbatches)]
        orders.append((*forwards, *backwards))
    return orders


def _interleaved(stages: int, chunks_per_stage: int, microbatches: int, backward: Pass, slack: int) -> list[Order]:
    """Forwards and backwards in turn after a warm-up; each round takes as many microbatches as there are stages.

    The last stage warms up until the first microbatch comes back for its last chunk, each stage before it by
    ``slack`` passes longer.
    """
    orders = []
    for stage in range(stages):
        forwards, backwards = [], []
        for slot in range(microbatches * chunks_per_stage):
            rounds, within = divmod(slot, stages * chunks_per_stage) if chunks_per_stage > 1 else (0, slot)
            turn, offset = divmod(within, stages) if chunks_per_stage > 1 else (0, within)
            microbatch = rounds * stages + offset
            forwards.append(Action(Pass.FORWARD, microbatch, turn * stages + stage))
            backwards.append(Action(backward, microbatch, (chunks_per_stage - 1 - turn) * stages + stage))
        warm_up = min(slack * (stages - 1 - stage) + (chunks_per_stage - 1) * stages, len(forwards))
        steady = [action for pair in zip(forwards[warm_up:], backwards, strict=False) for action in pair]
        orders.append((*forwards[:warm_up], *steady, *backwards[len(forwards) - warm_up :]))
    return orders


class _Clockwork:
    """A run of all stages, tick by tick, that decides their orders by what is ready when.

    Each part of a pass takes one tick. The first chunk has no input gradient that anybody waits for, so its backward
    pass is not split: whole, in two ticks, it waits for a gap as the weight parts of other chunks do.
    """

    def __init__(self, stage_of: Sequence[int], stages: int) -> None:
        self.last_chunk = len(stage_of) - 1
        self.now = 0
        self.live = [0] * stages
        self.pending: list[deque[Action]] = [deque() for _ in range(stages)]
        self.orders: list[list[Action]] = [[] for _ in range(stages)]
        self._free_at = [0] * stages
        self._finished: dict[Action, int] = {}

    @property
    def ticks(self) -> int:
        """When the last stage is free."""
        return max(self._free_at)

    def ready(self, action: Action) -> bool:
        """Whether all that a forward pass or an input part needs is there."""
        kind, microbatch, chunk = action
        if kind == Pass.FORWARD:
            return chunk == 0 or self._is_finished(Action(kind, microbatch, chunk - 1))
        return self._is_finished(Action(Pass.FORWARD, microbatch, chunk)) and (
            chunk == self.last_chunk or self._is_finished(Action(kind, microbatch, chunk + 1))
        )

    def run(self, choose: Callable[[int], Action | None], passes: int) -> "_Clockwork":
        """Let the free stages run what ``choose`` returns, or a waiting weight part, until ``passes`` were chosen.

        ``choose`` gives each forward pass and each input part once.
        """
        chosen = 0
        while chosen < passes or any(self.pending):
            before = chosen
            for stage, free_at in enumerate(self._free_at):
                if free_at > self.now:
                    continue
                while (action := choose(stage)) is not None:
                    chosen += 1
                    if action.kind == Pass.FORWARD or action.chunk:
                        break
                    self.pending[stage].append(action._replace(kind=Pass.BACKWARD))
                if action is None and self.pending[stage]:
                    action = self.pending[stage].popleft()
                if action is not None:
                    self._start(stage, action)
            self.now += 1
            assert chosen > before or self.ticks >= self.now, "all stages wait for each other"
        return self

    def _start(self, stage: int, action: Action) -> None:
        self.orders[stage].append(action)
        self._free_at[stage] = self._finished[action] = self.now + (2 if action.kind == Pass.BACKWARD else 1)
        self.live[stage] += {Pass.FORWARD: 1, Pass.INPUT: 0}.get(action.kind, -1)
        if action.kind == Pass.INPUT:
            self.pending[stage].append(action._replace(kind=Pass.WEIGHT))

    def _is_finished(self, action: Action) -> bool:
        return self._finished.get(action, self.now + 1) <= self.now


def _fill_with_weights(orders: Sequence[Order], stage_of: Sequence[int], limit: int) -> list[Order]:
    """Put the weight parts where a stage would wait, or where it holds ``limit`` activations."""
    clockwork = _Clockwork(stage_of, len(orders))
    waiting = [deque(order) for order in orders]

    def choose(stage: int) -> Action | None:
        queue = waiting[stage]
        full = clockwork.live[stage] >= limit and bool(clockwork.pending[stage])
        if queue and clockwork.ready(queue[0]) and not (queue[0].kind == Pass.FORWARD and full):
            return queue.popleft()
        return None

    clockwork.run(choose, sum(len(order) for order in orders))
    return [tuple(order) for order in clockwork.orders]


def _zero_bubble_v(stage_of: Sequence[int], stages: int, microbatches: int) -> list[Order]:
    """The fastest of three limits of activations: that of 1F1B, and up to one microbatch more."""
    candidates = [_greedy_v(stage_of, stages, microbatches, 2 * stages + extra) for extra in range(3)]
    return [tuple(order) for order in min(candidates, key=lambda candidate: candidate.ticks).orders]


def _greedy_v(stage_of: Sequence[int], stages: int, microbatches: int, limit: int) -> _Clockwork:
    """Input parts first, then forward passes, of the second chunk first, then weight parts."""
    clockwork = _Clockwork(stage_of, stages)
    waiting = {
        (kind, chunk): deque(Action(kind, microbatch, chunk) for microbatch in range(microbatches))
        for kind in (Pass.INPUT, Pass.FORWARD)
        for chunk in range(len(stage_of))
    }

    def choose(stage: int) -> Action | None:
        down, up = stage, clockwork.last_chunk - stage
        for kind, chunk in ((Pass.INPUT, down), (Pass.INPUT, up), (Pass.FORWARD, up), (Pass.FORWARD, down)):
            # The way down leaves room for one activation of the way up, or both would wait for ever.
            room = kind == Pass.INPUT or clockwork.live[stage] < limit - (chunk == down)
            queue = waiting[kind, chunk]
            if queue and room and clockwork.ready(queue[0]):
                return queue.popleft()
        return None

    return clockwork.run(choose, sum(len(queue) for queue in waiting.values()))


def _dual_pipe_v(stage: int, stages: int, microbatches: int) -> Order:
    """Two streams, down and up the V, that meet in every stage; the eight phases of DeepSeek's DualPipeV."""
    before = stages - 1 - stage
    chunks = (stage, 2 * stages - 1 - stage)
    order: list[Action] = []
    weights: deque[Action] = deque()
    counts = {(kind, side): 0 for kind in (Pass.FORWARD, Pass.BACKWARD) for side in (0, 1)}

    def run(kind: Pass, side: int, *, split: bool = False) -> None:
        action = Action(kind, counts[kind, side], chunks[side])
        counts[kind, side] += 1
        if not split:
            order.append(action)
        elif action.chunk:
            order.append(action._replace(kind=Pass.INPUT))
            weights.append(action._replace(kind=Pass.WEIGHT))
        else:  # nobody waits for the gradient of the tokens
            weights.append(action)

    for _ in range(2 * before):
        run(Pass.FORWARD, 0)
    for _ in range(stage + 1):
        run(Pass.FORWARD, 0)
        run(Pass.FORWARD, 1)
    for _ in range(before):
        run(Pass.BACKWARD, 1, split=True)
        order.append(weights.popleft())
        run(Pass.FORWARD, 1)
    for _ in range(microbatches - 2 * stages + stage + 1):
        run(Pass.FORWARD, 0)
        run(Pass.BACKWARD, 1)
        run(Pass.FORWARD, 1)
        run(Pass.BACKWARD, 0)
    for _ in range(before):
        run(Pass.BACKWARD, 1)
        run(Pass.FORWARD, 1)
        run(Pass.BACKWARD, 0)
    for number in range(2 * (stage + 1)):  # the second half is split, to fill the drain with weight parts
        run(Pass.BACKWARD, 1 - number % 2, split=number > stage)
    for _ in range(before):
        order.append(weights.popleft())
        run(Pass.BACKWARD, 0, split=True)
    return (*order, *weights)
