"""Functions that run on every rank of a real gloo group, each in a fork of the clean parent."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from tests.unit.worker import forked

Result = TypeVar("Result")

SILENCE_LIMIT = timedelta(seconds=60)


def on_ranks(ranks: int, function: Callable[..., Result], *arguments: Any) -> list[Result]:
    """Return ``function(*arguments)`` of each rank, in their order.

    What goes in and out is pickled: no tensors, whose memory would end with the process that made it.
    """
    port = forked.free_port()
    return forked.call_all([(_join, rank, ranks, port, function, arguments) for rank in range(ranks)])


def _join(rank: int, ranks: int, port: int, function: Callable[..., Result], arguments: tuple[Any, ...]) -> Result:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = distributed.TCPStore("127.0.0.1", port, world_size=ranks, is_master=rank == 0, timeout=SILENCE_LIMIT)  # type: ignore[attr-defined]
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=SILENCE_LIMIT)
    try:
        result = function(*arguments)
        distributed.barrier()  # a rank that leaves early would cut the others' transfers
        return result
    finally:
        distributed.destroy_process_group()
