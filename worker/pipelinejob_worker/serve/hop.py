"""One message a hop: a batch's header together with its hidden states, or the tokens drawn, over a TCP connection.

Everything is little-endian and of fixed layout; sizes are checked against what was agreed before memory is taken.
"""

import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipelinejob_worker.serve.batch import BLOCK, Batch, Drawn, Piece
from pipelinejob_worker.serve.wire import MAX_TOP_LOGPROBS, Sampling

MAGIC = b"pjs1"
BATCH, DRAWN, END = 1, 2, 3

_PREFIX = struct.Struct("<4sBBHQQIIII")
"""Magic, kind, element type, stages with a time, epoch, batch, then: pieces, blocks, rows, row size of a batch; drawn,
alternatives, 0, 0 of drawn tokens; zeros of the end."""

_ELEMENTS = (torch.float32, torch.bfloat16, torch.float16)
_PIECE = np.dtype(
    [
        ("start", "<u4"),
        ("count", "<u4"),
        ("blocks", "<u4"),
        ("top_k", "<u4"),
        ("seed", "<i8"),
        ("temperature", "<f8"),
        ("top_p", "<f8"),
        ("draws", "u1"),
        ("logprobs", "u1"),
        ("top_logprobs", "u1"),
    ]
)
_TOKEN = np.dtype([("token", "<i4"), ("alternatives", "u1"), ("has_logprob", "u1"), ("logprob", "<f8")])
_ALTERNATIVE = np.dtype([("token", "<i4"), ("logprob", "<f8")])
_NO_TOKEN = -1
_NO_SAMPLING = Sampling()

KEEPALIVE_SECONDS = 5
UNACKNOWLEDGED_MILLISECONDS = 10_000
"""A host that has vanished is noticed after this time, also where nothing is being sent."""


class HopError(Exception):
    """The connection to a neighbour broke, or what came over it is no message of this group."""


@dataclass(frozen=True)
class Bounds:
    """What the largest message of a group can have."""

    stages: int
    batch_tokens: int
    width: int
    blocks: int
    """Of the cache."""


@dataclass(frozen=True)
class Passed:
    """A batch with its hidden states ``[tokens, width]`` and the seconds that the stages before were busy in all."""

    epoch: int
    batch: Batch
    hidden: torch.Tensor
    busy: tuple[float, ...]


@dataclass(frozen=True)
class Returned:
    """The tokens drawn behind a batch's pieces, and how many seconds each stage was busy in all."""

    epoch: int
    number: int
    drawn: tuple[Drawn, ...]
    busy: tuple[float, ...]


@dataclass(frozen=True)
class End:
    """All is done: no more batches come."""

    epoch: int


class Hop:
    """One end of a connection between neighbours; one thread sends, one receives."""

    def __init__(self, connection: socket.socket, bounds: Bounds) -> None:
        self._connection = connection
        self._bounds = bounds
        tune(connection)

    def send(self, message: Passed | Returned | End) -> None:
        """Send a message whole. Raises HopError."""
        parts = [memoryview(part) for part in _parts(message) if len(part)]
        try:
            while parts:
                sent = self._connection.sendmsg(parts)
                while parts and sent >= len(parts[0]):
                    sent -= len(parts.pop(0))
                if sent:
                    parts[0] = parts[0][sent:]
        except OSError as error:
            raise HopError(f"a neighbour cannot be sent to: {error}") from error

    def receive(self) -> Passed | Returned | End:
        """Wait for the next message. Raises HopError, also when the neighbour has closed the connection."""
        prefix = bytearray(_PREFIX.size)
        self._fill(memoryview(prefix))
        magic, kind, element, stages, epoch, number, first, second, rows, width = _PREFIX.unpack(prefix)
        if magic != MAGIC or stages > self._bounds.stages:
            raise HopError(f"a neighbour sent no message of this group: it begins with {bytes(prefix[:8]).hex()}")
        busy = tuple(self._array(np.dtype("<f8"), stages, self._bounds.stages).tolist())
        if kind == DRAWN:
            return Returned(epoch, number, self._drawn(first, second), busy)
        if kind == END:
            return End(epoch)
        if kind != BATCH or element >= len(_ELEMENTS):
            raise HopError(
                f"a neighbour sent a message of kind {kind}, element type {element}; allowed: 1 to 3, 0 to 2"
            )
        pieces = self._pieces(first, second)
        if rows > self._bounds.batch_tokens or width != self._bounds.width:
            raise HopError(
                f"a neighbour sent hidden states of {rows} x {width}; allowed: at most {self._bounds.batch_tokens} x "
                f"{self._bounds.width}"
            )
        hidden = torch.empty(rows, width, dtype=_ELEMENTS[element])
        self._fill(_bytes_of(hidden))
        batch = Batch(number, pieces)
        if batch.size != rows:
            raise HopError(f"a neighbour sent {rows} hidden states for {batch.size} tokens")
        return Passed(epoch, batch, hidden, busy)

    def close(self) -> None:
        """Close the connection; a thread that waits in it gets HopError."""
        with suppress(OSError):  # the other end was faster
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _pieces(self, count: int, blocks: int) -> tuple[Piece, ...]:
        bounds = self._bounds
        rows = self._array(_PIECE, count, bounds.batch_tokens)
        table = self._array(np.dtype("<u4"), blocks, bounds.blocks).tolist()
        if int(rows["blocks"].sum()) != blocks or (table and max(table) > bounds.blocks):
            raise HopError(f"a neighbour sent block tables that do not fit {bounds.blocks} blocks")
        pieces, begin = [], 0
        for row in rows.tolist():
            start, tokens, used, top_k, seed, temperature, top_p, draws, logprobs, top_logprobs = row
            if start + tokens > used * BLOCK:
                raise HopError(f"a neighbour sent {used} blocks for {start + tokens} tokens")
            # Checked by stage 0 when it was submitted, and once a token is too often to check again.
            sampling = Sampling.model_construct(
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                logprobs=bool(logprobs),
                top_logprobs=top_logprobs,
            )
            pieces.append(Piece(start, tokens, tuple(table[begin : begin + used]), sampling if draws else None))
            begin += used
        return tuple(pieces)

    def _drawn(self, count: int, alternatives: int) -> tuple[Drawn, ...]:
        rows = self._array(_TOKEN, count, self._bounds.batch_tokens)
        named = self._array(_ALTERNATIVE, alternatives, count * MAX_TOP_LOGPROBS)
        if int(rows["alternatives"].sum()) != alternatives:
            raise HopError(f"a neighbour sent {alternatives} alternatives, and other numbers of them for its tokens")
        drawn, begin = [], 0
        for token, size, has_logprob, logprob in rows.tolist():
            mine = tuple((index, value) for index, value in named[begin : begin + size].tolist())
            drawn.append(Drawn(None if token == _NO_TOKEN else token, logprob if has_logprob else None, mine))
            begin += size
        return tuple(drawn)

    def _array(self, kind: "np.dtype[Any]", count: int, most: int) -> "np.ndarray[Any, Any]":
        if count > most:
            raise HopError(f"a neighbour announced {count} records; allowed: at most {most}")
        buffer = bytearray(count * kind.itemsize)
        self._fill(memoryview(buffer))
        return np.frombuffer(buffer, kind)

    def _fill(self, view: memoryview) -> None:
        try:
            while view:
                count = self._connection.recv_into(view)
                if not count:
                    raise HopError("a neighbour has closed the connection")
                view = view[count:]
        except OSError as error:
            raise HopError(f"a neighbour cannot be received from: {error}") from error


def tune(connection: socket.socket) -> None:
    """Send at once, and notice a vanished host."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MILLISECONDS)


def _parts(message: Passed | Returned | End) -> list[bytes | memoryview]:
    if isinstance(message, End):
        return [_PREFIX.pack(MAGIC, END, 0, 0, message.epoch, 0, 0, 0, 0, 0)]
    busy = np.array(message.busy, "<f8").tobytes()
    stages = len(message.busy)
    if isinstance(message, Returned):
        rows = [_token_row(drawn) for drawn in message.drawn]
        named = [each for drawn in message.drawn for each in drawn.alternatives]
        sizes = (len(rows), len(named), 0, 0)
        prefix = _PREFIX.pack(MAGIC, DRAWN, 0, stages, message.epoch, message.number, *sizes)
        return [prefix, busy, np.array(rows, _TOKEN).tobytes(), np.array(named, _ALTERNATIVE).tobytes()]
    batch, hidden = message.batch, message.hidden.detach().cpu().contiguous()
    table = np.array([block for piece in batch.pieces for block in piece.blocks], "<u4")
    prefix = _PREFIX.pack(
        MAGIC,
        BATCH,
        _ELEMENTS.index(hidden.dtype),
        stages,
        message.epoch,
        batch.number,
        len(batch.pieces),
        len(table),
        *hidden.shape,
    )
    pieces = np.array([_piece_row(piece) for piece in batch.pieces], _PIECE).tobytes()
    return [prefix, busy, pieces, table.tobytes(), _bytes_of(hidden)]


def _piece_row(piece: Piece) -> tuple[int | float, ...]:
    sampling = piece.sampling or _NO_SAMPLING
    return (
        piece.start,
        piece.count,
        len(piece.blocks),
        min(sampling.top_k, 0xFFFFFFFF),
        sampling.seed,
        sampling.temperature,
        sampling.top_p,
        piece.sampling is not None,
        sampling.logprobs,
        sampling.top_logprobs,
    )


def _token_row(drawn: Drawn) -> tuple[int | float, ...]:
    token = _NO_TOKEN if drawn.token is None else drawn.token
    return token, len(drawn.alternatives), drawn.logprob is not None, drawn.logprob or 0.0


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    array: Any = tensor.view(torch.uint8).numpy()
    return memoryview(array).cast("B")
