"""The stage loop on CUDA and NCCL: one stage a device."""

from pathlib import Path

import pytest
import torch

from tests.unit.worker.forked import pipeline
from tests.unit.worker.jobs import history, job

SPLITS = range(1, min(torch.cuda.device_count(), 4) + 1)


@pytest.mark.parametrize("schedule", ["GPipe", "1F1B"])
def test_every_split_over_the_devices_has_the_same_falling_losses(tmp_path: Path, schedule: str) -> None:
    config = job(tmp_path, steps=30, schedule=schedule, dropout="0.1")
    losses = {}
    for stages in SPLITS:
        checkpoints = tmp_path / str(stages)
        checkpoints.mkdir()
        with pipeline(config, stages, checkpoints, checkpoints, device_per_stage=True) as running:
            assert [stage.exit_code() for stage in running] == [0] * stages, "".join(stage.log for stage in running)
            assert all('"device": "cuda:' in stage.log for stage in running)
        losses[stages] = history(checkpoints)
    assert losses[1][-1] < 0.9 * losses[1][0]
    assert all(split == losses[1] for split in losses.values())


def test_a_job_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for directory, lengths in ((whole, [12]), (parts, [6, 12])):
        directory.mkdir()
        for attempt, steps in enumerate(lengths):
            config = job(tmp_path, steps=steps, dropout="0.1")
            with pipeline(config, 1, directory, directory, attempt, device_per_stage=True) as running:
                assert running[0].exit_code() == 0, running[0].log
    assert history(parts) == history(whole)
