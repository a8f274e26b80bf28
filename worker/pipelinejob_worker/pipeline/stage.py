"""The chunks of one stage: forward and backward passes of one microbatch, with their random state and precision."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.utils.checkpoint import checkpoint

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.models import Chunk
from pipelinejob_worker.models.randomness import mix
from pipelinejob_worker.protocol import Train

AUTOCAST = {"BFloat16": torch.bfloat16, "Float16": torch.float16}

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class RandomState:
    """What the next forward pass's random numbers depend on, besides the layer; never on the split."""

    seed: int
    first_microbatch: int = 0
    """Number of this pipeline's first microbatch among those of all pipelines."""

    step: int = 0
    microbatch: int = 0


def check_compiler(train: Train) -> None:
    """Raise ConfigurationError where layers shall be compiled and the image has no compiler.

    torch writes C++, on CUDA also for what starts its kernels.
    """
    if train.compile and not shutil.which(os.environ.get("CXX", "g++")) and not shutil.which("gcc"):
        raise ConfigurationError(
            "spec.train.compile: true, but this image has no C++ compiler; allowed: an image with one, for instance "
            "built from the worker image with g++ installed, or false"
        )


def prepare_layers(chunk: Chunk, train: Train, state: RandomState) -> None:
    """Make each layer set its random state before it runs, and compile or checkpoint it where the job says so.

    The state is set inside the checkpointed part, so that the second forward drops the same activations.
    """
    for index, layer in chunk.layers.items():
        run = torch.compile(layer.forward) if train.compile else layer.forward
        keep_inputs_only = train.activation_checkpointing
        layer.forward = partial(_run_layer, run, layer, index, state=state, checkpointed=keep_inputs_only)


def _run_layer(
    run: Callable[..., Any],
    layer: nn.Module,
    index: int,
    *args: Any,
    state: RandomState,
    checkpointed: bool,
    **kwargs: Any,
) -> Any:
    seeded = partial(_run_seeded, run, mix(state.seed, state.step, state.microbatch, index))
    if checkpointed and layer.training and torch.is_grad_enabled():
        return checkpoint(seeded, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
    return seeded(*args, **kwargs)


def _run_seeded(run: Callable[..., Any], seed: int, *args: Any, **kwargs: Any) -> Any:
    # torch.manual_seed visits every kind of device that torch knows, which takes longer than a small layer.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed(seed)
    return run(*args, **kwargs)


def check_hidden(maker: str, hidden: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise ConfigurationError when what ``maker`` passes on has another shape or type than the model announces."""
    if hidden.shape != expected.shape or hidden.dtype != expected.dtype:
        raise ConfigurationError(
            f"spec.model: {maker} passes on {hidden.dtype} {list(hidden.shape)}; allowed: {expected.dtype} "
            f"{list(expected.shape)} in every microbatch, as the model announces; correct its layers, width or context"
        )


@dataclass
class _Forward:
    """What a forward pass leaves for its backward pass: the input, and where the backward starts."""

    received: torch.Tensor | None
    root: GradientEdge | torch.Tensor
    weight_groups: list[dict[str, Any]] | None = None


class StageChunk:
    """Passes of one chunk. The last chunk ends in the loss, the first has no input gradient.

    The split backward is torch's own (``torch.distributed.pipelining``), which finds the two parts in the autograd
    graph. Outputs are kept as edges of the graph only, so a sent hidden state lives no longer than its message.
    """

    def __init__(self, module: Chunk, index: int, *, train: Train, state: RandomState, loss: Loss | None) -> None:
        """``loss`` is given for the last chunk."""
        self.module = module
        self._first = index == 0
        self._loss = loss
        self._state = state
        self._autocast = AUTOCAST.get(train.precision)
        self._kept: dict[int, _Forward] = {}

    def forward(
        self, microbatch: int, received: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the hidden state to pass on, or the last chunk's loss, both without a graph."""
        training = self.module.training
        if training and not self._first:
            received = received.detach().requires_grad_()
        self._state.microbatch = self._state.first_microbatch + microbatch
        with self._precision(received.device), nullcontext() if training else torch.no_grad():
            output = self.module(received, positions)
            if self._loss:
                assert targets is not None
                output = self._loss(output, targets)
        if training:
            root: GradientEdge | torch.Tensor = output if self._loss else get_gradient_edge(output)
            self._kept[microbatch] = _Forward(None if self._first else received, root)
        result: torch.Tensor = output.detach()
        return result

    def backward(self, microbatch: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """Add to the weights' gradients; return that of the input, if there is one.

        ``gradient`` is that of the output, None after the loss.
        """
        kept = self._kept.pop(microbatch)
        torch.autograd.backward((kept.root,), None if gradient is None else (gradient,))  # type: ignore[arg-type]
        return kept.received.grad if kept.received is not None else None

    def backward_input(self, microbatch: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """Return the gradient of the input only; ``backward_weight`` has to follow. Not for the first chunk."""
        kept = self._kept[microbatch]
        assert kept.received is not None
        gradients, kept.weight_groups = stage_backward_input(
            [kept.root], None if gradient is None else [gradient], [kept.received], self._weights()
        )
        return gradients[0]

    def backward_weight(self, microbatch: int) -> None:
        """Add to the weights' gradients what ``backward_input`` has left."""
        kept = self._kept.pop(microbatch)
        assert kept.weight_groups is not None
        stage_backward_weight(self._weights(), kept.weight_groups)

    def _weights(self) -> Iterator[nn.Parameter]:
        return (weight for weight in self.module.parameters() if weight.requires_grad)

    def _precision(self, device: torch.device) -> torch.autocast | nullcontext[None]:
        return torch.autocast(device.type, self._autocast) if self._autocast else nullcontext()
