"""The proof of the pipeline: its losses are those of one process, bit by bit, for every split."""

from pathlib import Path

import pytest

from tests.unit.worker.forked import run_to_end
from tests.unit.worker.jobs import history, job
from tests.unit.worker.reference import reference_losses


@pytest.mark.parametrize("schedule", ["GPipe", "1F1B"])
@pytest.mark.parametrize(("dropout", "clip_norm"), [("0", "0"), ("0.1", "0"), ("0.1", "0.5")])
def test_every_split_has_the_losses_of_one_process(tmp_path: Path, schedule: str, dropout: str, clip_norm: str) -> None:
    config = job(tmp_path, schedule=schedule, dropout=dropout, clip_norm=clip_norm, every_steps=100)
    expected = reference_losses(config, 12)
    assert expected[-1] < expected[0]
    for stages in (1, 2, 3, 4):
        checkpoints = tmp_path / str(stages)
        checkpoints.mkdir()
        assert run_to_end(config, stages, checkpoints, checkpoints) == [0] * stages
        assert history(checkpoints) == expected, f"{stages} stages"
