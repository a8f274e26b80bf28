"""Layers of the model in slots: copied from the live tensors into the slot's memory, without another copy between."""

import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod

import torch

from pipelinejob_worker.recovery.pieces import Held, Incarnation, Piece
from pipelinejob_worker.recovery.slots import SlotDamagedError, SlotStore

Tensors = Mapping[str, torch.Tensor]

_TYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}
"""Types by their names in the safetensors format. https://huggingface.co/docs/safetensors/index#format"""

_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_ALIGNMENT = 64
_HEADER_LIMIT_BYTES = 100_000_000
"""As the safetensors library has it."""


class Layout:
    """A safetensors file for tensors of certain names, shapes and types."""

    def __init__(self, tensors: Tensors) -> None:
        self._places = dict[str, tuple[int, int]]()
        data = 0
        for key in sorted(tensors, key=lambda key: (-tensors[key].itemsize, key)):  # so each is aligned
            self._places[key] = data, data + tensors[key].nbytes
            data += tensors[key].nbytes
        header = {
            key: {"dtype": _NAMES[tensors[key].dtype], "shape": list(tensors[key].shape), "data_offsets": list(ends)}
            for key, ends in self._places.items()
        }
        text = json.dumps(header).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        self._prefix = len(text).to_bytes(8, "little") + text
        self.size = len(self._prefix) + data
        """Bytes of the whole file."""

    def write(self, tensors: Tensors, memory: memoryview) -> None:
        """Fill ``memory``, which has the file's size. Waits for CUDA devices."""
        memory[: len(self._prefix)] = self._prefix
        data = memory[len(self._prefix) :]
        with torch.no_grad():
            for key, (start, end) in self._places.items():
                if end > start:
                    _view(data[start:end], tensors[key].dtype, tensors[key].shape).copy_(tensors[key])


def read(memory: memoryview) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file as views of its memory. Raises SlotDamagedError."""
    try:
        length = int.from_bytes(memory[:8], "little")
        header = json.loads(bytes(memory[8 : 8 + min(length, _HEADER_LIMIT_BYTES)]))
        data = memory[8 + length :]
        return {key: _tensor(data, entry) for key, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SlotDamagedError(f"no safetensors file: {error}") from error


def _tensor(data: memoryview, entry: Mapping[str, object]) -> torch.Tensor:
    dtype, shape, ends = _TYPES[str(entry["dtype"])], _integers(entry["shape"]), _integers(entry["data_offsets"])
    start, end = ends
    if not 0 <= start <= end <= len(data) or end - start != prod(shape) * dtype.itemsize or min(shape, default=0) < 0:
        raise ValueError(f"a tensor of shape {shape} has the bytes {start} to {end} of {len(data)}")
    return _view(data[start:end], dtype, shape) if end > start else torch.empty(shape, dtype=dtype)


def _integers(value: object) -> list[int]:
    if not isinstance(value, list) or not all(isinstance(number, int) for number in value):
        raise ValueError(f"{value!r} are no integers")
    return value


def _view(memory: memoryview, dtype: torch.dtype, shape: torch.Size | list[int]) -> torch.Tensor:
    return torch.frombuffer(memory, dtype=dtype).view(shape)


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
        self.seconds = 0.0
        """How long the newest snapshot took."""

        self._taken: Future[None] | None = self._thread.submit(store.reserve, sizes, copied=False)

    def begin(self, step: int, tensors: Mapping[Piece, Tensors]) -> None:
        """Start to copy the state after ``step`` steps. Call ``wait`` before the next one.

        Names, shapes and types are those given to the constructor. On CUDA the current stream is drained first.
        """
        self.wait()
        if any(tensor.is_cuda for each in tensors.values() for tensor in each.values()):
            torch.cuda.current_stream().synchronize()
        self._taken = self._thread.submit(self._take, step, tensors)

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
            layout.write(tensors[piece], writing.payload)
            writing.commit()
        self.seconds = time.monotonic() - started
        self._valid(step)


def load(store: SlotStore, piece: Piece, step: int) -> dict[str, torch.Tensor]:
    """Return a verified piece as views of the slot's memory: copy them before training goes on.

    Raises SlotMissingError and SlotDamagedError.
    """
    payload, _ = store.read(piece, step, copied=False)
    return read(payload)
