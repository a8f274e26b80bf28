"""Runs a function as the stages of one pipeline: a fresh process each, in a gloo group on the loopback interface."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed, multiprocessing

from pipelinejob_worker.pipeline.group import Group


def run_stages(stages: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what ``work(group, *arguments)`` gives on each stage, in their order."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    processes = [
        context.Process(target=_run, args=((stage, stages, port), answers, work, arguments)) for stage in range(stages)
    ]
    for process in processes:
        process.start()
    results = dict(answers.get() for _ in processes)
    for process in processes:
        process.join()
    return [results[stage] for stage in range(stages)]


def _run(place: tuple[int, int, int], answers: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    stage, stages, port = place
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=stage, world_size=stages)
    answers.put((stage, work(Group(stage, stages, torch.device("cpu")), *arguments)))
    distributed.barrier()
    distributed.destroy_process_group()
