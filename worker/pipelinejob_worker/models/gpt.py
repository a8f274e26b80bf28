"""The preset ``gpt``: a decoder-only transformer over bytes (Radford et al. 2019)."""

import torch
from torch import nn
from torch.nn import functional

from pipelinejob_worker.models.layered import LayeredModel
from pipelinejob_worker.protocol import Preset

VOCABULARY = 256
EXPANSION = 4
INITIAL_STD = 0.02


class Embedding(nn.Module):
    """Token ids ``[samples, context]`` to hidden states ``[samples, context, width]``."""

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, preset.width)
        self.position = nn.Embedding(preset.context, preset.width)
        self.dropout = nn.Dropout(float(preset.dropout))
        nn.init.normal_(self.token.weight, std=INITIAL_STD)
        nn.init.normal_(self.position.weight, std=INITIAL_STD)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Run the layer."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        hidden: torch.Tensor = self.dropout(self.token(tokens) + self.position(positions))
        return hidden


class Block(nn.Module):
    """Causal attention and a feed-forward network, each with a norm before and a residual around it."""

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        width = preset.width
        self.heads = preset.heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.expansion_norm = nn.LayerNorm(width)
        self.expansion = nn.Linear(width, EXPANSION * width)
        self.contraction = nn.Linear(EXPANSION * width, width)
        self.dropout = nn.Dropout(float(preset.dropout))
        # Projections onto the residual are scaled down with the depth, so that its variance does not grow.
        residual_std = INITIAL_STD / (2 * preset.layers) ** 0.5
        for linear in (self.query_key_value, self.expansion):
            nn.init.normal_(linear.weight, std=INITIAL_STD)
            nn.init.zeros_(linear.bias)
        for linear in (self.attention_output, self.contraction):
            nn.init.normal_(linear.weight, std=residual_std)
            nn.init.zeros_(linear.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run the layer."""
        hidden = hidden + self.dropout(self._attend(self.attention_norm(hidden)))
        expanded = functional.gelu(self.expansion(self.expansion_norm(hidden)))
        result: torch.Tensor = hidden + self.dropout(self.contraction(expanded))
        return result

    def _attend(self, hidden: torch.Tensor) -> torch.Tensor:
        samples, context, width = hidden.shape
        split = self.query_key_value(hidden).view(samples, context, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(
            query, key, value, dropout_p=self.dropout.p if self.training else 0.0, is_causal=True
        )
        result: torch.Tensor = self.attention_output(attended.transpose(1, 2).reshape(samples, context, width))
        return result


class Head(nn.Module):
    """Hidden states to logits ``[samples, context, 256]``; not tied to the embedding, which is elsewhere."""

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(preset.width)
        self.vocabulary = nn.Linear(preset.width, VOCABULARY, bias=False)
        nn.init.normal_(self.vocabulary.weight, std=INITIAL_STD)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run the layer."""
        logits: torch.Tensor = self.vocabulary(self.norm(hidden))
        return logits


class Gpt(LayeredModel):
    """Layers ``embedding``, ``blocks.0`` ... ``blocks.<n-1>``, ``head``."""

    def __init__(self, preset: Preset) -> None:
        self._preset = preset
        self.context = preset.context
        self.names = ("embedding", *(f"blocks.{index}" for index in range(preset.layers)), "head")
        self.costs = _costs(preset)
        self.fingerprint = (
            f"gpt layers={preset.layers} width={preset.width} heads={preset.heads} context={preset.context} "
            f"dropout={float(preset.dropout)!r}"
        )

    def hidden(self, samples: int) -> torch.Tensor:
        """``[samples, context, width]``."""
        return torch.empty(samples, self.context, self._preset.width, device="meta")

    def outputs(self, samples: int) -> torch.Tensor:
        """``[samples, context, 256]``."""
        return torch.empty(samples, self.context, VOCABULARY, device="meta")

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Sum of the cross entropies."""
        return functional.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="sum")

    def _build(self, index: int) -> nn.Module:
        if index == 0:
            return Embedding(self._preset)
        return Head(self._preset) if index == len(self.names) - 1 else Block(self._preset)


def _costs(preset: Preset) -> tuple[float, ...]:
    """Multiply-adds per token of a forward pass; the embedding only adds, attention is the causal half."""
    width, context = preset.width, preset.context
    block = (4 + 2 * EXPANSION) * width * width + width * context
    return (float(width), *[float(block)] * preset.layers, float(VOCABULARY * width))
