"""Layers in slots: the same bits back, in a format that others can read, and nothing that is not well formed."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.recovery import tensors
from pipelinejob_worker.recovery.pieces import Piece
from pipelinejob_worker.recovery.slots import SlotDamagedError, SlotMissingError
from pipelinejob_worker.recovery.tensors import Snapshots, load
from pipelinejob_worker.state.layout import Layout
from tests.unit.worker.recovery.snapshots import FIRST, store_in


def layer(value: float) -> dict[str, torch.Tensor]:
    torch.manual_seed(int(value))
    return {
        "weight.a": torch.randn(7, 5),
        "exp_avg.a": torch.randn(5, 7).t(),  # not contiguous
        "weight.empty": torch.empty(0, 3),
        "weight.half": torch.randn(3).to(torch.bfloat16),
        "weight.scalar": torch.tensor(value, dtype=torch.float64),
        "weight.requires_grad": torch.nn.Parameter(torch.randn(2)),
    }


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_snapshots_give_back_the_bits_of_the_step(memory: Path) -> None:
    store = store_in(memory)
    state = {Piece(0): layer(1), Piece(3): layer(2)}
    valid: list[int] = []
    snapshots = Snapshots(store, FIRST, 4, state, valid.append)
    for step in (5, 6):
        snapshots.begin(step, {Piece(0): layer(step), Piece(3): layer(10 * step)})
    snapshots.wait()
    snapshots.close()
    assert valid == [5, 6]
    reader = store_in(memory)
    assert {each.step for each in reader.held()} == {5, 6}
    for step in (5, 6):
        assert equal(load(reader, Piece(0), step), layer(step))
        assert equal(load(reader, Piece(3), step), layer(10 * step))


def test_a_piece_is_a_safetensors_file(memory: Path) -> None:
    store = store_in(memory)
    snapshots = Snapshots(store, FIRST, 1, {Piece(0): layer(1)}, print)
    snapshots.begin(1, {Piece(0): layer(1)})
    snapshots.close()
    payload, _ = store.read(Piece(0), 1, copied=False)
    assert equal(safetensors.torch.load(bytes(payload)), layer(1))


def test_what_does_not_fit_is_told_before_training(memory: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"spec.recovery: the snapshots need 16384 bytes"):
        Snapshots(store_in(memory, limit_bytes=10_000), FIRST, 1, {Piece(0): layer(1)}, print)


def test_a_failed_snapshot_is_told_when_waited_for(memory: Path) -> None:
    store = store_in(memory)
    snapshots = Snapshots(store, FIRST, 1, {Piece(0): layer(1)}, print)
    snapshots.wait()
    store.retain([], [])
    snapshots.begin(1, {Piece(0): layer(1)})
    with pytest.raises(SlotMissingError, match="no slot is reserved for piece 0-0-1"):
        snapshots.wait()
    snapshots.close()


def file(header: object, data: bytes = bytes(64)) -> memoryview:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return memoryview(bytearray(len(text).to_bytes(8, "little") + text + data))


@pytest.mark.parametrize(
    "content",
    [
        memoryview(b""),
        memoryview(b"\xff" * 16),
        file(b"{"),
        file([1]),
        file({"a": {}}),
        file({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}),
        file({"a": {"dtype": "F32", "shape": [17], "data_offsets": [0, 68]}}),
        file({"a": {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}}),
        file({"a": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}}),
        file({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0]}}),
        file({"a": {"dtype": "Q99", "shape": [4], "data_offsets": [0, 16]}}),
        file({"a": {"dtype": "F32", "shape": "4", "data_offsets": [0, 16]}}),
    ],
)
def test_what_is_no_safetensors_file_is_refused(content: memoryview) -> None:
    with pytest.raises(SlotDamagedError, match="no safetensors file"):
        tensors.read(content)


def test_the_layout_is_that_of_names_shapes_and_types_only() -> None:
    assert Layout(layer(1)).size == Layout(layer(2)).size
    assert Layout(layer(1)).size % 2 == 0
