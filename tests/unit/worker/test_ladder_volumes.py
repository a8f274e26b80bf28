"""Agents that recover among themselves beside a checkpoint volume that has filled up since."""

import signal
from pathlib import Path

import pytest

from pipelinejob_worker.protocol import ExitCode
from tests.unit.worker import forked
from tests.unit.worker.agents import until
from tests.unit.worker.ladders import Ladder, ladder_job
from tests.unit.worker.test_checkpoint_volumes import mount_volume


def _recover_beside_a_full_volume(directory: Path, volume: Path) -> None:
    mount_volume(volume, kibibytes=4096)
    config = ladder_job(directory, steps=120, volume="state")
    with Ladder(directory, config, 2, volume) as ladder:
        ladder.until_step(3)
        others = volume / "others.bin"
        with others.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            while True:
                file.write(bytes(4096))
        for rank in range(2):
            before = ladder.status()
            ladder.hit(rank, signal.SIGKILL)
            now = ladder.until_recovered(before)
            assert now.recovery.resumed_step > 0
            assert now.recovery.steps_repeated <= 1
        until(lambda: "No space left on device" in ladder.status().progress.checkpoint_problem)
        others.unlink()
        assert ladder.exit_codes() == [ExitCode.SUCCEEDED] * 2


def test_a_state_in_memory_needs_no_space_on_the_checkpoint_volume(tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    forked.call(_recover_beside_a_full_volume, tmp_path, volume)
