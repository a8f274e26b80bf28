"""The stage loop: one training step after another, with all other stages."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pipelinejob_worker.data import Batch, Source
from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.models import IGNORED, LayeredModel
from pipelinejob_worker.pipeline.engine import Built, Engine
from pipelinejob_worker.pipeline.group import Group
from pipelinejob_worker.pipeline.replicas import Replicas
from pipelinejob_worker.pipeline.schedule import Schedule
from pipelinejob_worker.pipeline.ties import TiedGradients, counted_elsewhere, tied_parameters
from pipelinejob_worker.pipeline.timeline import Activity
from pipelinejob_worker.protocol import Train
from pipelinejob_worker.train.learning_rate import learning_rate
from pipelinejob_worker.train.loss_scale import LossScale
from pipelinejob_worker.train.optimizer import (
    NormSlots,
    StageOptimizer,
    clip,
    parameter_counts,
    scale_gradients,
    squared_gradient_norms,
    total_norm,
)
from pipelinejob_worker.train.vote import Ballot, Result, vote

VALIDATION_STEPS = 8
"""A validation runs at most as many samples as this number of steps."""


@dataclass(frozen=True)
class StepResult:
    """What every stage knows after a step; ``skipped``: float16 overflowed, and the weights are as before."""

    loss: float
    seconds: float
    rank_seconds: list[dict[Activity, float]]
    flags: list[float]
    skipped: bool


class StageLoop:
    """The chunks of one stage, their optimizer, and the other copies of the stage."""

    def __init__(
        self,
        train: Train,
        model: LayeredModel,
        schedule: Schedule,
        chunks: Sequence[range],
        *,
        corpus: Source | None,
        group: Group,
        built: Built | None = None,
    ) -> None:
        """Build the layers, unless they are ``built``. The stages of the first and the last chunk need a ``corpus``.

        Collective over all ranks.
        """
        self.engine = Engine(model, train, schedule, chunks, group, built=built)
        self._train = train
        self._corpus = corpus
        self._group = group
        self._replicas = Replicas(self.layers, group.replicas, tied_parameters(model.ties))
        self.optimizer = StageOptimizer(train.optimizer, self.layers, self._replicas.owned)
        self._ties = TiedGradients(model.ties, self.layers, _rank_of(schedule, chunks))
        self._counted_elsewhere = counted_elsewhere(model.ties)
        counts = parameter_counts(self.layers, len(model.names)) if group.pipeline == 0 else None
        counts = torch.zeros(len(model.names), dtype=torch.int64) if counts is None else counts
        self._slots = NormSlots(group.sum(counts).tolist())
        self._samples = train.global_batch_size // train.microbatches
        self._scale = LossScale() if train.precision == "Float16" else None
        self._after_ballot = dict.fromkeys(Activity, 0.0)

    @property
    def layers(self) -> Mapping[int, nn.Module]:
        """This stage's layers by global index."""
        return self.engine.layers

    def numbers(self) -> dict[str, float]:
        """Return what a checkpoint must hold besides the layers."""
        return {"updates": float(self.optimizer.updates)} | (self._scale.to_numbers() if self._scale else {})

    def restore_numbers(self, numbers: Mapping[str, float]) -> None:
        """Put back what ``numbers`` gave."""
        if self._scale:
            self._scale = LossScale.from_numbers(numbers)

    def step(self, step: int, flags: Callable[[], Sequence[float]] = tuple) -> StepResult:
        """Run step ``step``, counted from 0, with all other stages.

        ``flags`` is called when the gradients are there, before the weights change; what it returns is added up over
        the ranks.

        The times of what follows the exchange with the other ranks are those of the step before.
        Raises ConfigurationError when the loss or the gradients are not finite: the same step would be so again.
        """
        started = time.perf_counter()
        self.engine.timeline.begin_step()
        losses = self._forward_and_backward(step)
        norms = self._gradient_norms()
        so_far = self.engine.timeline.seconds()
        seconds_of = {activity: so_far[activity] + self._after_ballot[activity] for activity in Activity}
        ballot = Ballot(norms, losses, seconds_of, flags())
        with self.engine.timeline.measure(Activity.WAITING):
            result = vote(self._group, self._slots, self._train.microbatches, self.engine.first_microbatch, ballot)
        skipped = not self._update(step, result)
        seconds = time.perf_counter() - started
        self._after_ballot = {
            activity: total - so_far[activity] for activity, total in self.engine.timeline.seconds().items()
        }
        return StepResult(result.loss, seconds, result.seconds, result.flags, skipped)

    def validate(self) -> float:
        """Return the mean loss of the validation split's tokens; collective over all ranks."""
        corpus_samples = self._group.gather(self._corpus.validation_samples if self._corpus else 0)
        rounds = min(max(row[0] for row in corpus_samples) // self._train.global_batch_size, VALIDATION_STEPS)
        self.engine.loss_divisor = 1.0
        table = torch.zeros(rounds * self._train.microbatches, 2, dtype=torch.float64)
        for number in range(rounds):
            first = number * self._train.microbatches + self.engine.first_microbatch
            counts: dict[int, float] = {}
            losses = self.engine.evaluate(self._validation_loader(first, counts))
            for microbatch, loss in enumerate(losses):
                table[first + microbatch] = torch.tensor([loss, counts[microbatch]], dtype=torch.float64)
        total, count = (sum(column) for column in zip(*self._group.sum(table).tolist(), strict=True))
        return float(total / count)

    def _forward_and_backward(self, step: int) -> list[float]:
        """Fill the gradients and begin their reduction; return the losses where the last chunk is."""
        self.optimizer.zero_grad()
        targets = self._corpus.targets_in(step) if self._corpus else 1
        scale = self._scale.scale if self._scale else 1.0
        self.engine.loss_divisor = targets / scale

        def load(microbatch: int) -> Batch:
            assert self._corpus is not None
            first = (self.engine.first_microbatch + microbatch) * self._samples
            return self._on_device(self._corpus.samples(step, first, self._samples))

        losses = self.engine.forward_and_backward(step, load, self._reduce_chunk)
        return [loss / scale for loss in losses]

    def _reduce_chunk(self, chunk: int) -> None:
        for layer in self.engine.layers_of[chunk]:
            self._replicas.start(layer)

    def _gradient_norms(self) -> dict[int, list[float]]:
        """Finish the gradients and return the squared norms of those that this rank has."""
        with self.engine.timeline.measure(Activity.UPDATE):
            with self._group.waiting():
                self._replicas.finish()
                if self._group.pipeline == 0:
                    self._ties.sum()
            if self._scale:
                scale_gradients(self.layers.values(), 1 / self._scale.scale)
            return squared_gradient_norms(self.layers, self._counted_elsewhere)

    def _update(self, step: int, result: Result) -> bool:
        """Update the weights, unless float16 has overflowed; whether it was done, the same on all ranks."""
        norm = total_norm(result.squared_norms)
        finite = math.isfinite(result.loss) and math.isfinite(norm)
        if not finite and (self._scale is None or self._scale.exhausted):
            raise _not_finite(self._train, step, result.loss, norm)
        with self.engine.timeline.measure(Activity.UPDATE):
            if finite:
                clip(self.layers.values(), norm, float(self._train.optimizer.clip_norm))
                self.optimizer.step(learning_rate(self._train.optimizer, step, self._train.steps))
                with self._group.waiting():
                    self._replicas.publish()
        if self._scale:
            self._scale = self._scale.after(finite)
        return finite

    def _validation_loader(self, first_microbatch: int, counts: dict[int, float]) -> Callable[[int], Batch]:
        def load(microbatch: int) -> Batch:
            assert self._corpus is not None
            batch = self._corpus.validation((first_microbatch + microbatch) * self._samples, self._samples)
            counts[microbatch] = float((batch.targets != IGNORED).sum())
            return self._on_device(batch)

        return load

    def _on_device(self, batch: Batch) -> Batch:
        device = self._group.device
        positions = None if batch.positions is None else batch.positions.to(device)
        return Batch(batch.tokens.to(device), batch.targets.to(device), positions)


def _rank_of(schedule: Schedule, chunks: Sequence[range]) -> Callable[[int], int]:
    """Return the function from a layer to the rank in pipeline 0, which is the stage, that has it."""
    ranks = {layer: schedule.stage_of[chunk] for chunk, layers in enumerate(chunks) for layer in layers}
    return ranks.__getitem__


def _not_finite(train: Train, step: int, loss: float, norm: float) -> ConfigurationError:
    return ConfigurationError(
        f"spec.train.optimizer.learningRate: with {train.optimizer.learning_rate} the loss is {loss} and the gradient "
        f"norm {norm} in step {step + 1}; allowed: a rate with which both stay finite; lower it or set a clipNorm"
    )
