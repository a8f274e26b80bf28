"""What a pipeline must reproduce bit by bit: one process that trains the same model without a pipeline.

It shares with the worker the layers, the samples and the seeds of dropout, and nothing else.
"""

import math
import os

import torch
from torch import nn

from pipelinejob_worker.data import Corpus
from pipelinejob_worker.models import Tie, model_of
from pipelinejob_worker.models.randomness import mix
from pipelinejob_worker.protocol import Optimizer, WorkerConfig
from tests.unit.worker import forked

AUTOCAST = {"Float32": None, "BFloat16": torch.bfloat16, "Float16": torch.float16}


def reference_losses(config: WorkerConfig, steps: int, copies: int = 1) -> list[float]:
    """Losses of the first ``steps`` steps, computed in a process of their own; ``copies`` sum their gradients first."""
    return forked.call(_losses, config, steps, copies)


def _losses(config: WorkerConfig, steps: int, copies: int) -> list[float]:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
    train = config.train
    model = model_of(config.model, documents=train.data.packing == "Documents")
    layers = [model.build(range(index, index + 1), train.seed).layers[index] for index in range(len(model.names))]
    passes = [torch.compile(layer.forward) if train.compile else layer.forward for layer in layers]
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    optimizer = _optimizer(train.optimizer, parameters)
    corpus = Corpus(train, model.context, model.vocabulary)
    samples = train.global_batch_size // train.microbatches
    autocast = AUTOCAST[train.precision]
    scale = 65536.0 if train.precision == "Float16" else 1.0
    losses = []
    for step in range(steps):
        sums: list[list[torch.Tensor]] = []
        step_loss = 0.0
        for microbatch in range(train.microbatches):
            batch = corpus.samples(step, microbatch * samples, samples)
            hidden = batch.tokens
            positions = torch.arange(model.context).expand(samples, -1) if batch.positions is None else batch.positions
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                for index, run in enumerate(passes):
                    torch.manual_seed(mix(train.seed, step, microbatch, index))
                    hidden = run(hidden, positions)
                loss = model.loss(hidden, batch.targets) / corpus.targets_in(step)
            (loss * scale).backward()
            step_loss += loss.item()
            if (microbatch + 1) % (train.microbatches // copies) == 0:
                sums.append([p.grad for p in parameters])
                optimizer.zero_grad()
        for parameter, gradients in zip(parameters, zip(*sums, strict=True), strict=True):
            parameter.grad = gradients[0]
            for gradient in gradients[1:]:
                parameter.grad = parameter.grad + gradient
        for parameter in parameters:
            parameter.grad = parameter.grad / scale
        if not all(parameter.grad.isfinite().all() for parameter in parameters):
            scale /= 2
            optimizer.zero_grad()
            losses.append(step_loss)
            continue
        counted_twice = _sum_ties(model.ties, layers)
        _clip(layers, counted_twice, float(train.optimizer.clip_norm))
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(train.optimizer, step, train.steps)
        if train.optimizer.name == "SGD":  # torch's SGD has no decoupled decay
            for parameter in parameters:
                if parameter.dim() > 1:
                    parameter.data *= 1 - group["lr"] * float(train.optimizer.weight_decay)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(step_loss)
    return losses


def _optimizer(settings: Optimizer, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if settings.name == "SGD":
        return torch.optim.SGD(parameters, momentum=float(settings.momentum))
    decays = {"params": [p for p in parameters if p.dim() > 1], "weight_decay": float(settings.weight_decay)}
    stays = {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0}
    return torch.optim.AdamW([decays, stays], betas=(float(settings.beta1), float(settings.beta2)))


def _learning_rate(settings: Optimizer, step: int, steps: int) -> float:
    peak, final = float(settings.learning_rate), float(settings.final_learning_rate)
    warmup = settings.warmup_steps
    if step + 1 < warmup:
        return peak * (step + 1) / warmup
    if settings.decay == "Constant":
        return peak
    start = max(warmup - 1, 0)
    progress = (step - start) / (steps - 1 - start)
    return peak * (1 - progress) + final * progress


def _sum_ties(ties: tuple[Tie, ...], layers: list[nn.Module]) -> list[nn.Parameter]:
    """Both ends of a tied weight are parameters of their own; return the last ends, which the norm leaves out."""
    for tie in ties:
        first = layers[tie.first_layer].get_parameter(tie.first_parameter)
        last = layers[tie.last_layer].get_parameter(tie.last_parameter)
        assert torch.equal(first, last)
        first.grad = last.grad = first.grad + last.grad
    return [layers[tie.last_layer].get_parameter(tie.last_parameter) for tie in ties]


def _clip(layers: list[nn.Module], counted_twice: list[nn.Parameter], limit: float) -> None:
    norm = math.sqrt(
        sum(
            sum(
                p.grad.double().norm().item() ** 2 for p in layer.parameters() if not any(p is q for q in counted_twice)
            )
            for layer in layers
        )
    )
    if 0 < limit < norm:
        for layer in layers:
            for parameter in layer.parameters():
                parameter.grad = parameter.grad * (limit / norm)
