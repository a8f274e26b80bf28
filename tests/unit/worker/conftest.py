"""What all tests of the worker need."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Pin the threads, as a worker does: another number of them sums in another order and gives other bits."""
    torch.set_num_threads(1)
