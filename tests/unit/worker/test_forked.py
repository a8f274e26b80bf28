"""The parent of all forks is fit to be one: importing the worker starts no thread and computes nothing."""

from pathlib import Path

import torch

from tests.unit.worker import forked


def _threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def _two_threads_and_a_backward() -> float:
    torch.set_num_threads(2)
    weight = torch.ones(512, 512, requires_grad=True)
    (weight @ weight).sum().backward()
    return float(weight.grad[0, 0])


def test_a_fork_has_one_thread_and_can_compute_with_several() -> None:
    assert forked.call(_threads) == 1
    assert forked.call(_two_threads_and_a_backward) == 1024
    assert forked.call(_two_threads_and_a_backward) == 1024
