"""The one interface of every model: an ordered list of named layers."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

IGNORED = -100
"""Target of a position that has no loss, as in torch's cross entropy."""


class Tie(NamedTuple):
    """Two parameters that are one weight: ``parameter`` of layer ``layer`` on both ends.

    Both ends always keep a copy, also on one stage, so that the bits do not depend on the split: their gradients
    are summed once a step, last, and counted once in the norm.
    """

    first_layer: int
    first_parameter: str
    last_layer: int
    last_parameter: str


@dataclass(frozen=True)
class Cost:
    """What is known of a layer without running it."""

    flops: float
    """Floating-point operations of a forward pass for one token; a multiply-add counts as two."""

    parameters: int
    """Number of weights."""


class Chunk(nn.Module, ABC):
    """Contiguous layers of a model that one stage runs as a unit.

    ``layers`` maps each global index to the module with that layer's parameters; what the loop does to a layer
    (random state, activation checkpointing, compilation) it does by wrapping that module's ``forward``, which
    ``forward`` of the chunk must therefore call, once for each layer.
    """

    layers: Mapping[int, nn.Module]

    @abstractmethod
    def forward(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Pass one microbatch through the layers.

        ``hidden``: token ids ``[samples, context]`` before the first layer, else the hidden state.
        ``positions``: int64 ``[samples, context]``, each token's place in its document; where it restarts at 0
        another document begins, which must not see the one before.
        """


class ChunkOfList(Chunk):
    """A chunk whose layers are called one after another, as ``layer(hidden, positions)``."""

    def __init__(self, layers: Mapping[int, nn.Module]) -> None:
        super().__init__()
        self.layers = layers
        self._modules_by_name = nn.ModuleDict({str(index): layer for index, layer in layers.items()})

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Pass one microbatch through the layers."""
        for layer in self.layers.values():
            hidden = layer(hidden, positions)
        return hidden


class LayeredModel(ABC):
    """A chain of layers. The first takes token ids, each passes a hidden state on, the last gives the logits.

    A layer's global name is its key everywhere: in checkpoints, in the gradient norm, in the partition.
    """

    names: tuple[str, ...]
    """Global names of the layers, first to last."""

    costs: tuple[Cost, ...]
    """Of each layer, in their order."""

    context: int
    """Tokens of a sample that the model reads."""

    vocabulary: int
    """Number of token ids that the model knows."""

    width: int
    """Size of the hidden state that passes between two layers."""

    ties: tuple[Tie, ...] = ()
    """Weights that two layers share."""

    fingerprint: str
    """What determines the layers' shapes and behaviour, readable; equal for equal models."""

    separates_documents: bool = True
    """Whether the layers obey ``positions``, so that documents in one sample do not see each other."""

    @abstractmethod
    def build(self, indices: range, seed: int) -> Chunk:
        """Build the layers ``indices`` on the CPU in float32; each layer's weights are a function of
        ``(seed, index)`` or come from the model's files, never of the other layers built with it.
        """

    def inputs(self, samples: int) -> torch.Tensor:
        """Return shape and type of a microbatch of token ids, on the meta device: ``[samples, context]``."""
        return torch.empty(samples, self.context, dtype=torch.int64, device="meta")

    def hidden(self, samples: int) -> torch.Tensor:
        """Return the shape and type of what passes between two layers: ``[samples, context, width]``, on meta."""
        return torch.empty(samples, self.context, self.width, device="meta")

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the sum of all tokens' losses, a scalar.

        ``logits`` ``[samples, context, vocabulary]``, ``targets`` ``[samples, context]``: token ids or IGNORED.
        """
        return functional.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )


class ListModel(LayeredModel):
    """A model whose layers are called one after another, as ``layer(hidden, positions)``."""

    def build(self, indices: range, seed: int) -> Chunk:
        """Build the layers ``indices``."""
        return ChunkOfList({index: self.layer(index, seed) for index in indices})

    @abstractmethod
    def layer(self, index: int, seed: int) -> nn.Module:
        """Build one layer on the CPU in float32, its weights a function of ``(seed, index)``."""
