"""What a pipeline must reproduce bit by bit: one process that trains the same model without a pipeline."""

import math
import os

import torch
from torch.nn import functional

from pipelinejob_worker.models import model_of
from pipelinejob_worker.models.randomness import mix
from pipelinejob_worker.protocol import WorkerConfig
from pipelinejob_worker.train.data import Corpus
from tests.unit.worker import forked


def reference_losses(config: WorkerConfig, steps: int) -> list[float]:
    """Losses of the first ``steps`` steps, computed in a process of their own."""
    return forked.call(_losses, config, steps)


def _losses(config: WorkerConfig, steps: int) -> list[float]:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
    train, model = config.train, model_of(config.model)
    layers = [model.build(index, train.seed) for index in range(len(model.names))]
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [p for p in parameters if p.dim() > 1],
                "weight_decay": float(train.optimizer.weight_decay),
            },
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=float(train.optimizer.learning_rate),
    )
    corpus = Corpus(train, model.context)
    samples = train.global_batch_size // train.microbatches
    clip_norm = float(train.optimizer.clip_norm)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        step_loss = 0.0
        for microbatch in range(train.microbatches):
            text = corpus.samples(step, microbatch * samples, samples)
            hidden = text[:, :-1]
            for index, layer in enumerate(layers):
                torch.manual_seed(mix(train.seed, step, microbatch, index))
                hidden = layer(hidden)
            loss = functional.cross_entropy(hidden.flatten(0, 1), text[:, 1:].flatten(), reduction="sum")
            loss = loss / (train.global_batch_size * model.context)
            loss.backward()
            step_loss += loss.item()
        norm = math.sqrt(sum(sum(p.grad.double().norm().item() ** 2 for p in layer.parameters()) for layer in layers))
        if 0 < clip_norm < norm:
            for parameter in parameters:
                parameter.grad *= clip_norm / norm
        optimizer.step()
        losses.append(step_loss)
    return losses
