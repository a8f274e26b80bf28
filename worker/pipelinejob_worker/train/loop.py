"""The stage loop: one incarnation of one stage, from the newest checkpoint to the last step or a drain."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.models import LayeredModel
from pipelinejob_worker.pipeline.group import Group
from pipelinejob_worker.pipeline.schedule import build_schedule
from pipelinejob_worker.pipeline.stage import StageModule, TimedStage
from pipelinejob_worker.protocol import Train
from pipelinejob_worker.train.data import Corpus, inputs_of, targets_of
from pipelinejob_worker.train.optimizer import build_optimizer, clip, squared_gradient_norm, total_norm


@dataclass(frozen=True)
class StepResult:
    """What every stage knows after a step."""

    loss: float
    seconds: float
    busy_seconds: list[float]
    stop: bool


class StageLoop:
    """The layers of one stage, their optimizer and the schedule that runs them with the other stages."""

    def __init__(self, train: Train, model: LayeredModel, layers: range, corpus: Corpus | None, group: Group) -> None:
        """Build the layers. ``corpus`` is needed by the first and the last stage only."""
        self.module = StageModule(model, layers, train.seed, group.device)
        self.optimizer = build_optimizer(train.optimizer, self.module.layers)
        self._train = train
        self._corpus = corpus
        self._group = group
        self._model = model
        self._samples = train.global_batch_size // train.microbatches
        self._stage = TimedStage(self.module, model, self._samples, group)
        self._schedule = build_schedule(
            train.schedule.name,
            self._stage,
            train.microbatches,
            _loss(model, train.global_batch_size * model.context),
        )

    def step(self, step: int, stop: bool) -> StepResult:
        """Run step ``step``, counted from 0, with all other stages; ``stop`` asks all to stop after it.

        Raises ConfigurationError when the loss or the gradients are not finite: the same step would be so
        again.
        """
        started = time.perf_counter()
        loss = self._forward_and_backward(step)
        vote = self._vote(loss, stop)
        norm = total_norm(vote.squared_norms)
        self._check_finite(step, vote.loss, norm)
        clip(self.module.layers, norm, float(self._train.optimizer.clip_norm))
        self.optimizer.step()
        return StepResult(vote.loss, time.perf_counter() - started, vote.busy_seconds, vote.stop)

    def _forward_and_backward(self, step: int) -> float:
        """Fill the gradients; return the loss on the last stage, 0 on the others.

        The loss is summed over the microbatches in their order, in float64, as a single process would do it.
        """
        self.module.step = step
        self.optimizer.zero_grad(set_to_none=True)
        losses: list[torch.Tensor] = []
        microbatches = range(self._train.microbatches)
        self._schedule.step(
            arg_mbs=[(tokens,) for tokens in self._load(step, inputs_of)] if self._group.first else None,
            kwarg_mbs=[{"microbatch": microbatch} for microbatch in microbatches],
            target_mbs=self._load(step, targets_of) if self._group.last else None,
            losses=losses if self._group.last else None,
            return_outputs=False,
        )
        return sum(loss.item() for loss in losses)

    def _load(self, step: int, part_of: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        assert self._corpus is not None
        return [
            part_of(self._corpus.samples(step, microbatch * self._samples, self._samples)).to(self._group.device)
            for microbatch in range(self._train.microbatches)
        ]

    def _vote(self, loss: float, stop: bool) -> "_Vote":
        """Exchange what the stages must agree on, in one all-reduce of float64.

        Every element but the stop bit is zero on all stages but one, so the sum is exact and has the same
        bits for every split; each element is then used in layer order.
        """
        layers, stages = len(self._model.names), self._group.stages
        vector = torch.zeros(layers + stages + 2, dtype=torch.float64)
        for index, layer in zip(self.module.indices, self.module.layers, strict=True):
            vector[index] = squared_gradient_norm(layer)
        vector[layers + self._group.stage] = self._stage.clock.take()
        vector[-2] = loss
        vector[-1] = float(stop)
        total = self._group.sum(vector).tolist()
        return _Vote(total[:layers], total[layers : layers + stages], total[-2], total[-1] > 0)

    def _check_finite(self, step: int, loss: float, norm: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise ConfigurationError(
                f"spec.train.optimizer.learningRate: with {self._train.optimizer.learning_rate} the loss is "
                f"{loss} and the gradient norm {norm} in step {step + 1}; allowed: a rate with which both "
                "stay finite; lower it or set a clipNorm"
            )


@dataclass(frozen=True)
class _Vote:
    squared_norms: list[float]
    busy_seconds: list[float]
    loss: float
    stop: bool


def _loss(model: LayeredModel, tokens: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Loss of a microbatch, divided by the tokens of the whole step."""
    return lambda output, target: model.loss(output, target) / tokens
