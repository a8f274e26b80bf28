"""Saving and loading by real process groups, of which no background thread may make use."""

import os
import resource
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed

from pipelinejob_worker.protocol import Membership
from pipelinejob_worker.state.commit import resume
from pipelinejob_worker.state.saver import AsyncSaver
from tests.unit.worker import forked
from tests.unit.worker.checkpoints import NAMES, PATIENCE_SECONDS, memberships, same, shapes, share, store


def _total(values: torch.Tensor) -> torch.Tensor:
    distributed.all_reduce(values)
    return values


def _train(membership: Membership, directory: Path, attempt: int, steps: int, file_limit: int | None) -> list[object]:
    """Resume and go on to ``steps`` as one rank: a vote at each step, a save every 5, the last one waited for."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{membership.master_port}",
        rank=membership.rank,
        world_size=membership.world_size,
        timeout=timedelta(seconds=PATIENCE_SECONDS),
    )
    checkpoints = store(directory, attempt)
    resumed = resume(checkpoints, membership, _total, NAMES, shapes(membership))
    if file_limit is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the log may be a file
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    saver = AsyncSaver(checkpoints, membership, NAMES, 2, resumed)
    for step in range(resumed.step + 1, steps + 1):
        saver.advance(_total(torch.tensor(saver.vote(), dtype=torch.float64)).tolist())
        if step == steps:
            saver.finish(_total)
        if step == steps or step % 5 == 0:
            saver.begin(step, share(membership, step), {"goodSteps": step})
    saver.finish(_total)
    distributed.destroy_process_group()
    whole = same(resumed.layers, resumed.step)
    return [resumed.step, whole, resumed.extra, saver.saved_step, saver.problem]


def train(
    directory: Path, stages: int, pipelines: int, steps: int, attempt: int = 0, limits: dict[int, int] | None = None
) -> list[list[object]]:
    """What each rank tells at its end. ``limits``: bytes that a file of a rank may have."""
    ranks = memberships(stages, pipelines, forked.free_port())
    forked.call(int)  # starts the parent of all forks
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(
            pool.map(lambda of: forked.call(_train, of, directory, attempt, steps, (limits or {}).get(of.rank)), ranks)
        )


@pytest.mark.parametrize(("stages", "pipelines"), [(1, 1), (3, 1), (1, 3), (2, 2)])
def test_two_pipelines_are_resumed_by_any_number(tmp_path: Path, stages: int, pipelines: int) -> None:
    assert train(tmp_path, 2, 2, steps=17) == [[0, True, {}, 17, ""]] * 4
    ranks = stages * pipelines
    assert train(tmp_path, stages, pipelines, steps=18, attempt=1) == [[17, True, {"goodSteps": 17}, 18, ""]] * ranks


def test_a_rank_that_cannot_write_is_known_to_all(tmp_path: Path) -> None:
    train(tmp_path, 2, 2, steps=5)
    problem = "the checkpoint of step 9 was not written: stage 1 of pipeline 0: File too large; the newest is of step 5"
    assert (
        train(tmp_path, 2, 2, steps=9, attempt=1, limits={1: 100})
        == [
            [5, True, {"goodSteps": 5}, 5, problem],
        ]
        * 4
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000000005"]
