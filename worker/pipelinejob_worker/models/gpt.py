"""The preset ``gpt``: a decoder-only transformer over bytes (Radford et al. 2019)."""

import torch
from torch import nn
from torch.nn import functional

from pipelinejob_worker.models.layered import Cost, ListModel, Tie
from pipelinejob_worker.models.randomness import mix
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

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Run the layer."""
        hidden: torch.Tensor = self.dropout(self.token(tokens) + self.position(positions))
        return hidden


class Block(nn.Module):
    """Causal attention and a feed-forward network, each with a norm before and a residual around it."""

    def __init__(self, preset: Preset, *, documents: bool) -> None:
        super().__init__()
        width = preset.width
        self.heads = preset.heads
        self.documents = documents
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

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Run the layer."""
        mask = same_document(positions) if self.documents else None
        hidden = hidden + self.dropout(self._attend(self.attention_norm(hidden), mask))
        expanded = functional.gelu(self.expansion(self.expansion_norm(hidden)))
        result: torch.Tensor = hidden + self.dropout(self.contraction(expanded))
        return result

    def _attend(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        samples, context, width = hidden.shape
        split = self.query_key_value(hidden).view(samples, context, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        dropout = self.dropout.p if self.training else 0.0
        attended = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None
        )
        result: torch.Tensor = self.attention_output(attended.transpose(1, 2).reshape(samples, context, width))
        return result


class Head(nn.Module):
    """Hidden states to logits ``[samples, context, 256]``."""

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(preset.width)
        self.vocabulary = nn.Linear(preset.width, VOCABULARY, bias=False)
        nn.init.normal_(self.vocabulary.weight, std=INITIAL_STD)

    def forward(self, hidden: torch.Tensor, _positions: torch.Tensor) -> torch.Tensor:
        """Run the layer."""
        logits: torch.Tensor = self.vocabulary(self.norm(hidden))
        return logits


def same_document(positions: torch.Tensor) -> torch.Tensor:
    """Who may attend to whom, ``[samples, 1, context, context]``: earlier tokens of the same document."""
    document = (positions == 0).cumsum(dim=1)
    causal = torch.ones(positions.shape[1], positions.shape[1], dtype=torch.bool, device=positions.device).tril()
    return ((document[:, :, None] == document[:, None, :]) & causal)[:, None]


class Gpt(ListModel):
    """Layers ``embedding``, ``blocks.0`` ... ``blocks.<n-1>``, ``head``.

    ``documents``: samples hold several documents, so the blocks need a mask; without it attention is faster.
    """

    def __init__(self, preset: Preset, *, documents: bool = False) -> None:
        self._preset = preset
        self._documents = documents
        self.context = preset.context
        self.vocabulary = VOCABULARY
        self.width = preset.width
        self.names = ("embedding", *(f"blocks.{index}" for index in range(preset.layers)), "head")
        self.costs = _costs(preset)
        if preset.tie_embeddings:
            self.ties = (Tie(0, "token.weight", len(self.names) - 1, "vocabulary.weight"),)
        self.fingerprint = (
            f"gpt layers={preset.layers} width={preset.width} heads={preset.heads} context={preset.context} "
            f"dropout={float(preset.dropout)!r}"
        ) + (" tied" if preset.tie_embeddings else "")

    def layer(self, index: int, seed: int) -> nn.Module:
        """Build one layer."""
        torch.manual_seed(mix(seed, index))
        if index == 0:
            return Embedding(self._preset)
        if index < len(self.names) - 1:
            return Block(self._preset, documents=self._documents)
        head = Head(self._preset)
        if self.ties:  # the bits of the other end, which another stage may have built
            embedding = self.layer(0, seed)
            assert isinstance(embedding, Embedding)
            head.vocabulary.weight = nn.Parameter(embedding.token.weight.detach().clone())
        return head


def _costs(preset: Preset) -> tuple[Cost, ...]:
    """Of the matrices; an embedding only adds, and attention sees half of the context on average."""
    width, context = preset.width, preset.context
    block = Cost(
        flops=2.0 * ((4 + 2 * EXPANSION) * width * width + width * context),
        parameters=(4 + 2 * EXPANSION) * width * width + (9 + EXPANSION) * width,
    )
    embedding = Cost(flops=0.0, parameters=(VOCABULARY + context) * width)
    return (embedding, *[block] * preset.layers, Cost(2.0 * VOCABULARY * width, (VOCABULARY + 2) * width))
