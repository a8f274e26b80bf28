"""Safetensors files in memory: where each tensor is, so that copying the tensors is all that it takes to fill one.

Format: https://huggingface.co/docs/safetensors/index#format
"""

import json
from collections.abc import Mapping
from math import prod
from typing import NamedTuple

import torch

Tensors = Mapping[str, torch.Tensor]

TYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}
"""Types by their names in the format."""

_NAMES = {dtype: name for name, dtype in TYPES.items()}
_ALIGNMENT = 64
_HEADER_LIMIT_BYTES = 100_000_000
"""As the safetensors library has it."""


class Place(NamedTuple):
    """Where in the file a tensor's bytes are, and what they are."""

    start: int
    end: int
    dtype: torch.dtype
    shape: torch.Size


class Layout:
    """A file for tensors of certain names, shapes and types."""

    def __init__(self, tensors: Tensors) -> None:
        ends, data = dict[str, tuple[int, int]](), 0
        for key in sorted(tensors, key=lambda key: (-tensors[key].itemsize, key)):  # so each is aligned
            ends[key] = data, data + tensors[key].nbytes
            data += tensors[key].nbytes
        header = {
            key: {"dtype": _NAMES[tensors[key].dtype], "shape": list(tensors[key].shape), "data_offsets": list(between)}
            for key, between in ends.items()
        }
        text = json.dumps(header).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        self.prefix = len(text).to_bytes(8, "little") + text
        """What the file begins with."""

        base = len(self.prefix)
        self.size = base + data
        """Bytes of the whole file."""

        self.places = {
            key: Place(base + start, base + end, tensors[key].dtype, tensors[key].shape)
            for key, (start, end) in ends.items()
        }

    def fits(self, tensors: Tensors) -> bool:
        """Whether ``tensors`` have the names, shapes and types that the file is laid out for."""
        return {key: (place.shape, place.dtype) for key, place in self.places.items()} == {
            key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()
        }


def parse(memory: memoryview) -> dict[str, Place]:
    """Return where the tensors of a file are. Raises ValueError when it is none."""
    try:
        length = int.from_bytes(memory[:8], "little")
        header = json.loads(bytes(memory[8 : 8 + min(length, _HEADER_LIMIT_BYTES)]))
        return {key: _place(entry, 8 + length, len(memory)) for key, entry in header.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no safetensors header: {error}") from error


def _place(entry: Mapping[str, object], base: int, size: int) -> Place:
    dtype, shape, ends = TYPES[str(entry["dtype"])], _integers(entry["shape"]), _integers(entry["data_offsets"])
    start, end = ends
    bytes_needed = prod(shape) * dtype.itemsize
    if not 0 <= start <= end <= size - base or end - start != bytes_needed or min(shape, default=0) < 0:
        raise ValueError(f"a tensor of shape {shape} has the bytes {start} to {end} of {size - base}")
    return Place(base + start, base + end, dtype, torch.Size(shape))


def _integers(value: object) -> list[int]:
    if not isinstance(value, list) or not all(isinstance(number, int) for number in value):
        raise ValueError(f"{value!r} are no integers")
    return value
