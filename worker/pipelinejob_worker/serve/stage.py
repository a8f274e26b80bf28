"""The layers of one stage: from a batch's tokens or hidden states to hidden states or the logits to draw from."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

import torch

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.models import Chunk, LayeredModel
from pipelinejob_worker.serve.adapters import refused, use_paged_attention
from pipelinejob_worker.serve.attention import PagedCache, attending, step_of
from pipelinejob_worker.serve.batch import BLOCK, Batch, Piece, blocks_for

TILE = 16
"""Rows of every matrix product in deterministic mode. The kernels choose their order of summation by the shape, so a
row's bits are a function of the row alone only if the number of rows is always the same."""

CHECKED_TOKENS = 48
TOLERANCE = 1e-3
"""Largest difference, relative to the size of the result, between the model's own attention and ours at start-up; what
a wrong mask, scale or position changes is larger by orders of magnitude."""

_SERVABLE = "a decoder with full or sliding attention, for instance Llama or Qwen 3"


class Stage:
    """Layers ``indices`` of a model, with the keys and values of their attention in blocks."""

    def __init__(
        self,
        model: LayeredModel,
        indices: range,
        device: torch.device,
        cache_bytes: int,
        *,
        deterministic: bool,
        fill: Callable[[Chunk], None] = lambda _: None,
    ) -> None:
        """Load the layers, check that they compute with the cache what they do without, and size the cache.

        ``fill`` replaces the weights of layers, if others than the model's own are to be served. Raises
        ConfigurationError when the model cannot be read or served.
        """
        self._fill = fill
        self.deterministic = deterministic
        self.device = device
        self.last = indices.stop == len(model.names)
        body = indices[:-1] if self.last else indices
        self._body = self._build(model, body) if body else None
        self._head = self._build(model, indices[-1:]) if self.last else None
        self._cache = PagedCache(blocks_for(CHECKED_TOKENS) + 1)
        self._vocabulary = model.vocabulary
        self._first = 0 in indices
        with torch.inference_mode():
            self._check(model)
        if self._head:
            use_paged_attention(model, self._head)  # it attends to nothing, and so makes no masks either
        self.blocks = self._capacity(cache_bytes)
        self._cache = PagedCache(self.blocks)

    def run(self, batch: Batch, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Pass a batch on: ``hidden`` ``[tokens, width]`` of the stage before, none on stage 0, to that of the next.

        The last stage returns the logits ``[draws, vocabulary]`` of those pieces behind which a token is drawn.
        """
        with torch.inference_mode():
            received = torch.tensor(batch.tokens, device=self.device) if hidden is None else hidden.to(self.device)
            result = self._run_body(received, batch.pieces)
            if self._head is None:
                return result
            ends = accumulate(piece.count for piece in batch.pieces)
            wanted = [end - 1 for end, piece in zip(ends, batch.pieces, strict=True) if piece.sampling]
            rows = result[torch.tensor(wanted, dtype=torch.int64, device=self.device)]
            return self._run_head(self._head, rows)

    def _build(self, model: LayeredModel, indices: range) -> Chunk:
        chunk = model.build(indices, seed=0)
        self._fill(chunk)
        return chunk.to(self.device).eval().requires_grad_(False)

    def _run_body(self, received: torch.Tensor, pieces: Sequence[Piece]) -> torch.Tensor:
        if self._body is None:
            return received
        if not self.deterministic:
            return self._pass(self._body, received, pieces)
        # One after the other through all layers: what a token reads lies in its own tile or in one before.
        tiles = zip(torch.split(received, TILE), split(pieces, TILE), strict=True)
        return torch.cat([self._pass(self._body, _padded(rows), part)[: len(rows)] for rows, part in tiles])

    def _pass(self, body: Chunk, received: torch.Tensor, pieces: Sequence[Piece]) -> torch.Tensor:
        positions = [place for piece in pieces for place in range(piece.start, piece.start + piece.count)]
        positions += [0] * (len(received) - len(positions))
        with attending(step_of(self._cache, pieces, self.device, invariant=self.deterministic)):
            result: torch.Tensor = body(received[None], torch.tensor(positions, device=self.device)[None])
        return result[0]

    def _run_head(self, head: Chunk, rows: torch.Tensor) -> torch.Tensor:
        if not len(rows):
            return rows.new_empty(0, self._vocabulary)
        if not self.deterministic:
            return self._logits(head, rows)
        return torch.cat([self._logits(head, _padded(tile))[: len(tile)] for tile in torch.split(rows, TILE)])

    def _logits(self, head: Chunk, rows: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = head(rows[None], torch.arange(len(rows), device=self.device)[None])
        return result[0]

    def _check(self, model: LayeredModel) -> None:
        """Compare one request in chunks over the cache with a plain pass; then, for deterministic, with itself."""
        if self._body is None:
            return
        tokens = min(CHECKED_TOKENS, model.context)
        received = self._values(model, tokens)
        plain = self._body(received[None], torch.arange(tokens, device=self.device)[None])[0]
        use_paged_attention(model, self._body)
        blocks = tuple(range(blocks_for(tokens), 0, -1))
        first = tokens // 2
        cuts = [(0, first), *((place, 1) for place in range(first, min(first + 3, tokens)))]
        cuts.append((first + 3, tokens - first - 3))
        pieces = [Piece(start, count, blocks[: blocks_for(start + count)]) for start, count in cuts if count > 0]
        try:
            paged = torch.cat([self._run_body(received[slice_of(piece)], [piece]) for piece in pieces])
        except ConfigurationError:
            raise
        except Exception as error:  # the code of any architecture may raise anything
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise refused("spec.model", f"its layers do not run with a cache ({problem})", _SERVABLE) from error
        attention = {layer for layer in self._body.layers if 0 < layer < len(model.names) - 1}
        if len(self._cache.layers) != len(attention):
            found = f"{len(self._cache.layers)} of its {len(attention)} layers use an attention that can be replaced"
            raise refused("spec.model", found, _SERVABLE)
        if (difference := _difference(paged, plain)) > TOLERANCE:
            problem = f"with a cache its layers differ by {difference:.1e} from what they compute without"
            raise refused("spec.model", problem, _SERVABLE)
        if self.deterministic:
            self._check_invariance(received, blocks)

    def _check_invariance(self, received: torch.Tensor, blocks: tuple[int, ...]) -> None:
        """One token beside others must have the bits that it had alone."""
        last = Piece(len(received) - 1, 1, blocks)
        other = Piece(0, min(len(received), TILE), (max(blocks) + 1,))
        beside = self._run_body(torch.cat((received[slice_of(other)], received[-1:])), [other, last])
        alone = self._run_body(received[-1:], [last])
        again = self._run_body(torch.cat((received[-1:], received[slice_of(other)])), [last, other])
        if not (torch.equal(beside[-1], alone[0]) and torch.equal(again[0], alone[0])):
            raise ConfigurationError(
                "spec.serve.deterministic: true does not fit this model: its layers give a token other bits beside "
                "other tokens, as mixtures of experts do; allowed: false"
            )

    def _values(self, model: LayeredModel, tokens: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        if self._first:
            return torch.randint(model.vocabulary, (tokens,), generator=generator).to(self.device)
        return torch.randn(tokens, model.width, generator=generator).to(self.device)

    def _capacity(self, cache_bytes: int) -> int:
        """Blocks that fit in ``cache_bytes``; as good as endless on a stage without attention."""
        size = self._cache.block_bytes
        blocks = cache_bytes // size if size else 1 << 30
        if blocks < 1:
            raise ConfigurationError(
                f"spec.serve.keyValueCacheMiB: {cache_bytes >> 20} holds no block of {BLOCK} tokens of this stage's "
                f"layers, which takes {size} bytes; allowed: at least {(size >> 20) + 1}"
            )
        return blocks


def split(pieces: Sequence[Piece], size: int) -> Iterator[list[Piece]]:
    """Cut pieces into lists of ``size`` tokens, the last one perhaps with fewer; nothing is drawn behind the parts."""
    part: list[Piece] = []
    room = size
    for piece in pieces:
        start, end = piece.start, piece.start + piece.count
        while start < end:
            count = min(room, end - start)
            part.append(replace(piece, start=start, count=count, sampling=None))
            start, room = start + count, room - count
            if not room:
                yield part
                part, room = [], size
    if part:
        yield part


def slice_of(piece: Piece) -> slice:
    """Return where a piece's tokens are in its request."""
    return slice(piece.start, piece.start + piece.count)


def _padded(rows: torch.Tensor) -> torch.Tensor:
    missing = TILE - len(rows)
    return torch.cat((rows, rows.new_zeros(missing, *rows.shape[1:]))) if missing else rows


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    norm = torch.linalg.vector_norm
    return float(norm(one - other) / norm(other))
