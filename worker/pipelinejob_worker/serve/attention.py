"""Attention over keys and values that lie in blocks, without a kernel of its own."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from pipelinejob_worker.serve.batch import BLOCK, Piece, blocks_for

INVARIANT_KEYS = 64
"""Keys of a query are padded to a multiple of this when its result must not depend on others: its own length alone
then decides the shapes that it is computed in."""


@dataclass(frozen=True)
class Queries:
    """Queries that attend in one call: ``rows`` sequences with equally many queries each."""

    indices: torch.Tensor
    """``[rows, queries]``: where they are among the tokens of the batch."""

    positions: torch.Tensor
    """``[rows, queries]``: of each in its request."""

    slots: torch.Tensor
    """``[rows, keys]``: where the keys of positions 0, 1, ... are in the cache; more than there are is padding."""

    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)
    """By the size of the attention's window, made when a layer first needs it."""

    def mask(self, window: int | None) -> torch.Tensor:
        """Return which keys each query sees, ``[rows, 1, queries, keys]``."""
        if window not in self.masks:
            keys = torch.arange(self.slots.shape[1], device=self.slots.device)
            seen = keys <= self.positions[:, :, None]
            if window is not None:
                seen &= keys > self.positions[:, :, None] - window
            self.masks[window] = seen[:, None]
        return self.masks[window]

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """Return of ``part`` ``[slots, heads, size]`` what each row reads, ``[rows, heads, keys, size]``."""
        found = part.index_select(0, self.slots.flatten())
        return found.view(*self.slots.shape, *part.shape[1:]).transpose(1, 2)


class PagedCache:
    """Keys and values of a stage's own layers in ``blocks`` blocks and the zeros of block 0.

    Each layer's part is made with its first keys: what shapes they have is the model's affair.
    """

    def __init__(self, blocks: int) -> None:
        self._slots = (blocks + 1) * BLOCK
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def block_bytes(self) -> int:
        """Bytes of a block, over all layers seen so far."""
        return sum(part[:BLOCK].nbytes for layer in self._layers.values() for part in layer)

    @property
    def layers(self) -> frozenset[int]:
        """The layers whose keys came by."""
        return frozenset(self._layers)

    def of(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the layer's keys and values ``[slots, heads, size]``; new ones are like these ``[tokens, ...]``."""
        if layer not in self._layers:
            self._layers[layer] = (
                keys.new_zeros(self._slots, *keys.shape[1:]),
                values.new_zeros(self._slots, *values.shape[1:]),
            )
        return self._layers[layer]


@dataclass(frozen=True)
class Step:
    """One pass through a stage's layers: where its tokens' keys go, and which keys each query reads."""

    cache: PagedCache
    slots: torch.Tensor
    """``[tokens]``: where the keys and values of each token go. Tokens beyond these are padding of the batch."""

    begun: torch.Tensor
    """Slots of blocks whose first token comes now: they are cleared, so that no request ever reads another's."""

    queries: tuple[Queries, ...]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Store keys and values, and return what the queries attend to, ``[1, tokens, heads, size]``.

        ``query`` ``[1, heads, tokens, size]``; ``key`` and ``value`` alike, with as many heads or a divisor of it.
        ``window``: how many positions back a query sees, itself included. ``softcap``: bound of the scores.
        """
        count = self.slots.numel()
        key, value = key[0].transpose(0, 1), value[0].transpose(0, 1)
        keys, values = self.cache.of(layer, key, value)
        for stored, new in ((keys, key), (values, value)):
            stored.index_fill_(0, self.begun, 0)
            stored.index_copy_(0, self.slots, new[:count])
        rows = query[0].transpose(0, 1)
        attended = rows.new_zeros(rows.shape[0], rows.shape[1], value.shape[2])
        for queries in self.queries:
            found_keys, found_values = (
                part.index_select(0, queries.slots.flatten())
                .view(*queries.slots.shape, *part.shape[1:])
                .transpose(1, 2)
                for part in (keys, values)
            )
            asked = rows[queries.indices].transpose(1, 2)
            result = _attention(asked, found_keys, found_values, queries.mask(window), scale=scale, softcap=softcap)
            attended[queries.indices] = result.transpose(1, 2)
        return attended[None]


def step_of(cache: PagedCache, pieces: Sequence[Piece], device: torch.device, *, invariant: bool) -> Step:
    """Plan a pass over ``pieces``, whose tokens follow one another.

    Single queries of about equal length share a call, and so do the queries of a piece. With ``invariant`` each
    query is a row of its own, and its shapes depend on its position alone.
    """
    places = [(piece, place) for piece in pieces for place in range(piece.start, piece.start + piece.count)]
    groups = _each_alone(places) if invariant else _by_length(pieces)
    return Step(
        cache,
        _tensor([_slot(piece, place) for piece, place in places], device),
        _tensor(
            [
                slot
                for piece, place in places
                if place % BLOCK == 0
                for slot in range(_slot(piece, place), _slot(piece, place) + BLOCK)
            ],
            device,
        ),
        tuple(_queries(rows, keys, device) for rows, keys in groups),
    )


_current: ContextVar[Step] = ContextVar("step")


@contextmanager
def attending(step: Step) -> Iterator[None]:
    """Make ``step`` the one of the layers that run inside."""
    token = _current.set(step)
    try:
        yield
    finally:
        _current.reset(token)


def current_step() -> Step:
    """Return the step of the pass that is running."""
    return _current.get()


_Row = tuple[int, Piece, range]
"""Index of its first query in the batch, the piece, positions of the queries."""


def _by_length(pieces: Sequence[Piece]) -> Iterator[tuple[list[_Row], int]]:
    """Rows that attend together, and their keys. Together they are padded to less than twice their blocks."""
    singles: defaultdict[int, list[_Row]] = defaultdict(list)
    index = 0
    for piece in pieces:
        end = piece.start + piece.count
        row = (index, piece, range(piece.start, end))
        if piece.count == 1:
            singles[blocks_for(end).bit_length()].append(row)
        else:
            yield [row], end
        index += piece.count
    for rows in singles.values():
        yield rows, max(blocks_for(places.stop) for _, _, places in rows) * BLOCK


def _each_alone(places: Iterable[tuple[Piece, int]]) -> Iterator[tuple[list[_Row], int]]:
    groups: defaultdict[int, list[_Row]] = defaultdict(list)
    for index, (piece, place) in enumerate(places):
        groups[place // INVARIANT_KEYS + 1].append((index, piece, range(place, place + 1)))
    for size, rows in groups.items():
        yield rows, size * INVARIANT_KEYS


def _queries(rows: Sequence[_Row], keys: int, device: torch.device) -> Queries:
    blocks = blocks_for(keys)
    tables = _tensor([[*piece.blocks[:blocks], *[0] * (blocks - len(piece.blocks))] for _, piece, _ in rows], device)
    slots = tables[:, :, None] * BLOCK + torch.arange(BLOCK, device=device)
    return Queries(
        indices=_tensor([range(index, index + len(places)) for index, _, places in rows], device),
        positions=_tensor([places for _, _, places in rows], device),
        slots=slots.flatten(1)[:, :keys],
    )


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    *,
    scale: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """``query`` ``[rows, heads, queries, size]``, ``key`` and ``value`` with heads that several queries share."""
    rows, heads, queries, size = query.shape
    groups = key.shape[1]
    if softcap is not None:
        scale = size**-0.5 if scale is None else scale
        key, value = (part.repeat_interleave(heads // groups, 1) for part in (key, value))
        scores = torch.tanh(query @ key.transpose(2, 3) * (scale / softcap)) * softcap
        return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value
    if queries == 1:  # heads that share keys are like queries of one head
        folded = query.view(rows, groups, heads // groups, size)
        result = functional.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scale)
        return result.reshape(rows, heads, 1, -1)
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=groups < heads
    )


def _slot(piece: Piece, place: int) -> int:
    return piece.blocks[place // BLOCK] * BLOCK + place % BLOCK


def _tensor(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)
