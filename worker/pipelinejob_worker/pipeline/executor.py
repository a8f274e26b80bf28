"""Runs a stage's order of actions: computes, and passes on what the next chunk waits for."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pipelinejob_worker.data import Batch
from pipelinejob_worker.pipeline.exchange import Exchange
from pipelinejob_worker.pipeline.routes import Routes
from pipelinejob_worker.pipeline.schedule import Action, Order, Pass
from pipelinejob_worker.pipeline.stage import StageChunk
from pipelinejob_worker.pipeline.timeline import Activity, Timeline

ACTIVITIES = {
    Pass.FORWARD: Activity.FORWARD,
    Pass.BACKWARD: Activity.BACKWARD,
    Pass.INPUT: Activity.BACKWARD,
    Pass.WEIGHT: Activity.WEIGHT,
}


@dataclass(frozen=True)
class Step:
    """What one step runs: the stage's order with its messages, and where the data come from."""

    order: Order
    routes: Routes
    load: Callable[[int], Batch]
    """Microbatch of this pipeline to its data, on the device; called on the stages of the first and last chunk."""

    backward_done: Callable[[int], None]
    """Called with a chunk when its last backward pass is done: its gradients are complete."""


class Executor:
    """The chunks of one stage and the messages between them and the other stages."""

    def __init__(
        self,
        chunks: dict[int, StageChunk],
        last_chunk: int,
        exchange: Exchange,
        timeline: Timeline,
        positions: torch.Tensor,
        *,
        moves: Callable[[], None] = lambda: None,
    ) -> None:
        """``positions`` are those of samples that are one document: they stay here, others travel.

        ``moves`` is called before each pass.
        """
        self._chunks = chunks
        self._last = last_chunk
        self._exchange = exchange
        self._timeline = timeline
        self._positions = positions
        self._moves = moves

    def run(self, step: Step) -> list[torch.Tensor]:
        """Run all actions; return the losses of the microbatches in their order, where the last chunk is."""
        self._step = step
        self._losses: dict[int, torch.Tensor] = {}
        self._handed: dict[Action, tuple[torch.Tensor, ...]] = {}
        remaining = {chunk: sum(_completes(action, chunk) for action in step.order) for chunk in self._chunks}
        self._exchange.begin_step(step.routes)
        for action in step.order:
            self._moves()
            self._run(action)
            if _completes(action, action.chunk):
                remaining[action.chunk] -= 1
                if not remaining[action.chunk]:
                    step.backward_done(action.chunk)
        self._exchange.finish_step()
        return [self._losses[microbatch] for microbatch in sorted(self._losses)]

    def _run(self, action: Action) -> None:
        kind, microbatch, number = action
        chunk = self._chunks[number]
        if kind == Pass.FORWARD:
            self._forward(action, chunk)
        elif kind == Pass.WEIGHT:
            with self._timeline.measure(Activity.WEIGHT, microbatch, number):
                chunk.backward_weight(microbatch)
        else:
            gradient = self._take(action)[0] if number < self._last else None
            run = chunk.backward if kind == Pass.BACKWARD else chunk.backward_input
            with self._timeline.measure(Activity.BACKWARD, microbatch, number):
                result = run(microbatch, gradient)
            if number:
                assert result is not None
                self._pass_on(action, result)

    def _forward(self, action: Action, chunk: StageChunk) -> None:
        _, microbatch, number = action
        batch = self._step.load(microbatch) if number in (0, self._last) else None
        positions: tuple[torch.Tensor, ...]
        if number == 0:
            assert batch is not None
            received, positions = batch.tokens, () if batch.positions is None else (batch.positions,)
        else:
            received, *rest = self._take(action)
            positions = tuple(rest)
        targets = batch.targets if batch and number == self._last else None
        with self._timeline.measure(Activity.FORWARD, microbatch, number):
            output = chunk.forward(microbatch, received, positions[0] if positions else self._positions, targets)
        if number == self._last:
            self._losses[microbatch] = output
        else:
            self._pass_on(action, output, *positions)

    def _take(self, action: Action) -> list[torch.Tensor]:
        """Return what the neighbouring chunk has made for ``action``, here or on another stage."""
        if action in self._step.routes.receives:
            return self._exchange.receive(action)
        return list(self._handed.pop(_key(action)))

    def _pass_on(self, action: Action, *parts: torch.Tensor) -> None:
        if action in self._step.routes.sends:
            self._exchange.send(action, *parts)
        else:
            towards = 1 if action.kind == Pass.FORWARD else -1
            self._handed[_key(action._replace(chunk=action.chunk + towards))] = parts


def _key(action: Action) -> Action:
    """Make a whole backward pass and the input's part of one the same: chunks on one stage may run either."""
    return action._replace(kind=Pass.BACKWARD) if action.kind == Pass.INPUT else action


def _completes(action: Action, chunk: int) -> bool:
    return action.chunk == chunk and action.kind in (Pass.BACKWARD, Pass.WEIGHT)
