"""Layers of the model in slots: copied from the live tensors into the slot's memory, without another copy between."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from statistics import median

import torch

from pipelinejob_worker.recovery.pieces import Held, Incarnation, Piece
from pipelinejob_worker.recovery.slots import SlotDamagedError, SlotStore
from pipelinejob_worker.state.layout import Layout, Place, Tensors, parse

TIMED_SNAPSHOTS = 5
"""How many of the newest snapshots tell how long one takes: one of them may have met a busy core."""


def write(layout: Layout, tensors: Tensors, memory: memoryview) -> None:
    """Fill ``memory``, which has the size of the file. Waits for CUDA devices."""
    memory[: len(layout.prefix)] = layout.prefix
    with torch.no_grad():
        for key, place in layout.places.items():
            _view(memory, place).copy_(tensors[key])


def read(memory: memoryview) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file as views of its memory. Raises SlotDamagedError."""
    try:
        return {key: _view(memory, place) for key, place in parse(memory).items()}
    except ValueError as error:
        raise SlotDamagedError(f"no safetensors file: {error}") from error


def _view(memory: memoryview, place: Place) -> torch.Tensor:
    if place.start == place.end:
        return torch.empty(place.shape, dtype=place.dtype)
    return torch.frombuffer(memory[place.start : place.end], dtype=place.dtype).view(place.shape)


class Snapshots:
    """Snapshots of this rank's pieces, taken by a thread while the worker computes the next step.

    The tensors may be read meanwhile, as forward and backward passes do; ``wait`` before they change. Copying and
    checksumming leave Python's interpreter lock free.
    """

    def __init__(
        self,
        store: SlotStore,
        written: Incarnation,
        layers: int,
        tensors: Mapping[Piece, Tensors],
        valid: Callable[[int], object],
    ) -> None:
        """Have slots made for pieces like ``tensors``, of a model of ``layers`` layers, while the first step computes.

        ``valid`` is called by the thread with each step whose snapshot has become valid.
        Raises ConfigurationError when there is no room.
        """
        self._store = store
        self._written = written
        self._layers = layers
        self._valid = valid
        self._layouts = {piece: Layout(each) for piece, each in tensors.items()}
        sizes = {piece: layout.size for piece, layout in self._layouts.items()}
        store.check_room(sizes, copied=False)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="snapshot")
        self._seconds: deque[float] = deque(maxlen=TIMED_SNAPSHOTS)
        self._taken: Future[None] | None = self._thread.submit(store.reserve, sizes, copied=False)

    def begin(self, step: int, tensors: Mapping[Piece, Tensors]) -> None:
        """Start to copy the state after ``step`` steps. Call ``wait`` before the next one.

        Names, shapes and types are those given to the constructor. On CUDA the current stream is drained first.
        """
        self.wait()
        if any(tensor.is_cuda for each in tensors.values() for tensor in each.values()):
            torch.cuda.current_stream().synchronize()
        self._taken = self._thread.submit(self._take, step, tensors)

    @property
    def seconds(self) -> float:
        """How long a snapshot takes: the median of the newest ones, 0 before the first."""
        return median(tuple(self._seconds) or (0.0,))

    def wait(self) -> None:
        """Wait until the snapshot is valid. Raises what kept it from that."""
        if self._taken:
            self._taken.result()
            self._taken = None

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def _take(self, step: int, tensors: Mapping[Piece, Tensors]) -> None:
        started = time.monotonic()
        for piece, layout in self._layouts.items():
            writing = self._store.begin(
                Held(piece=piece, step=step, written=self._written, size=layout.size, layers=self._layers)
            )
            write(layout, tensors[piece], writing.payload)
            writing.commit()
        self._seconds.append(time.monotonic() - started)
        self._valid(step)


def load(store: SlotStore, piece: Piece, step: int) -> dict[str, torch.Tensor]:
    """Return a verified piece as views of the slot's memory: copy them before training goes on.

    Raises SlotMissingError and SlotDamagedError.
    """
    payload, _ = store.read(piece, step, copied=False)
    return read(payload)
