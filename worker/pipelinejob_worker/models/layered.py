"""The one interface of every model: an ordered list of named layers."""

from abc import ABC, abstractmethod

import torch
from torch import nn

from pipelinejob_worker.models.randomness import mix


class LayeredModel(ABC):
    """A chain of layers. The first takes token ids, each passes a hidden state on, the last gives the output.

    A layer's global name is its key everywhere: in checkpoints, in the gradient norm, in the partition.
    """

    names: tuple[str, ...]
    """Global names of the layers, first to last."""

    costs: tuple[float, ...]
    """Relative compute of each layer for one token; input of the partition."""

    context: int
    """Tokens of a sample that the model reads."""

    fingerprint: str
    """What determines the layers' shapes and behaviour, readable; equal for equal models."""

    def build(self, index: int, seed: int) -> nn.Module:
        """Build layer ``index`` on the CPU in float32, its weights a function of ``(seed, index)`` alone."""
        torch.manual_seed(mix(seed, index))
        return self._build(index)

    def inputs(self, samples: int) -> torch.Tensor:
        """Return shape and type of a microbatch of token ids, on the meta device: ``[samples, context]``."""
        return torch.empty(samples, self.context, dtype=torch.int64, device="meta")

    @abstractmethod
    def hidden(self, samples: int) -> torch.Tensor:
        """Return the shape and type of what passes between two layers, on the meta device."""

    @abstractmethod
    def outputs(self, samples: int) -> torch.Tensor:
        """Return the shape and type of the last layer's output, on the meta device."""

    @abstractmethod
    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the sum of all tokens' losses, a scalar; ``target`` is ``[samples, context]`` token ids."""

    @abstractmethod
    def _build(self, index: int) -> nn.Module:
        """Build layer ``index`` with torch's default generator."""
