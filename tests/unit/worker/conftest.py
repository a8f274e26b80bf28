"""What all tests of the worker need."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory on a memory-backed file system, as the pod's volume is."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Pin the threads, as a worker does: another number of them sums in another order and gives other bits."""
    torch.set_num_threads(1)
