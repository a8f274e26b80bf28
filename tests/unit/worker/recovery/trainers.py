"""What a zygote with everything imported forks: a worker that computes a little."""

import socket
from pathlib import Path

import torch

import pipelinejob_worker.train.worker  # noqa: F401 - as the real zygote does

THREADS_OF_THE_ZYGOTE = len(list(Path("/proc/self/task").iterdir()))


def work(link: socket.socket) -> int:
    """Run a matrix product and its backward pass with as many threads as the link says; tell the gradient."""
    torch.set_num_threads(int(link.recv(16)))
    weight = torch.ones(512, 512, requires_grad=True)
    (weight @ weight).sum().backward()
    link.sendall(f"{weight.grad[0, 0].item():.0f}".encode())
    return THREADS_OF_THE_ZYGOTE
