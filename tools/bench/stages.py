"""Runs a function as the stages of one pipeline: a fresh process each, in a gloo group on the loopback interface."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import distributed

from pipelinejob_worker.pipeline.group import Group


def run_stages(stages: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what ``work(group, *arguments)`` gives on each stage, in their order."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # A fresh process for each: their largest resident set must be their own.
    with ProcessPoolExecutor(stages, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as processes:
        running = [processes.submit(_run, stage, stages, port, work, arguments) for stage in range(stages)]
        return [one.result() for one in running]


def _run(stage: int, stages: int, port: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=stage, world_size=stages)
    try:
        answer = work(Group(stage, stages, torch.device("cpu")), *arguments)
        distributed.barrier()
        return answer
    finally:
        distributed.destroy_process_group()
