"""Agents that recover among themselves, with real workers: the losses are those of one process, bit by bit."""

import signal
from pathlib import Path

import pytest

from pipelinejob_worker.protocol import ExitCode
from tests.unit.worker.agents import until
from tests.unit.worker.ladders import Ladder, ladder_job
from tests.unit.worker.reference import reference_losses

SIGNALS = [signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP]


def test_workers_that_die_or_hang_are_replaced_and_the_others_keep_their_processes(tmp_path: Path) -> None:
    config = ladder_job(tmp_path, steps=60)
    with Ladder(tmp_path, config, 3) as ladder:
        ladder.until_step(3)
        for rank in range(3):
            for number in SIGNALS:
                before, workers = ladder.status(), ladder.workers()
                ladder.hit(rank, number)
                now = ladder.until_recovered(before)
                kept = [one == other for one, other in zip(workers, ladder.workers(), strict=True)]
                assert kept == [other != rank for other in range(3)], f"{number.name} of rank {rank}"
                assert now.recovery.steps_repeated <= 1
                print(number.name, rank, now.recovery)
        told = ladder.status().failures
        assert [(each.rank, each.signal) for each in told] == [
            (rank, "SIGKILL" if number == signal.SIGSTOP else number.name) for rank in range(3) for number in SIGNALS
        ]
        assert ladder.exit_codes() == [ExitCode.SUCCEEDED] * 3
        assert ladder.losses() == reference_losses(config, 60)


@pytest.mark.parametrize("rank", range(3))
def test_a_lost_pod_is_restored_from_its_copy_and_only_its_layers_travel(tmp_path: Path, rank: int) -> None:
    config = ladder_job(tmp_path, steps=40)
    with Ladder(tmp_path, config, 3) as ladder:
        witness = (rank + 1) % 3
        before, workers = ladder.until_step(3, witness), ladder.workers()
        ladder.replace(rank)
        now = ladder.until_recovered(before, witness)
        kept = [one == other for one, other in zip(workers, ladder.workers(), strict=True)]
        assert kept == [other != rank for other in range(3)]
        assert now.recovery.steps_repeated <= 1
        assert now.recovery.resumed_step > 0
        assert ladder.exit_codes() == [ExitCode.SUCCEEDED] * 3
        assert ladder.losses() == reference_losses(config, 40)


def test_a_container_that_ends_without_a_word_finds_its_snapshots_again(tmp_path: Path) -> None:
    config = ladder_job(tmp_path, steps=40)
    with Ladder(tmp_path, config, 2) as ladder:
        for rank, witness in ((0, 1), (1, 0)):
            before = ladder.until_step(3, witness)
            ladder.restart_container(rank)
            now = ladder.until_recovered(before, witness)
            assert now.recovery.steps_repeated <= 1
            restarted = ladder.status(rank)
            assert restarted.failures[-1].reason == "ContainerLost"
            assert restarted.worker_restarts == 1
        assert ladder.exit_codes() == [ExitCode.SUCCEEDED] * 2
        assert ladder.losses() == reference_losses(config, 40)


def test_rescaling_up_and_down_keeps_the_workers_that_stay_and_repeats_no_step(tmp_path: Path) -> None:
    config = ladder_job(tmp_path, steps=60)
    with Ladder(tmp_path, config, 2) as ladder:
        for stages in (3, 2, 1, 2):
            before, workers = ladder.until_step(3), ladder.workers()
            ladder.scale(stages)
            now = ladder.until_recovered(before)
            print(stages, now.recovery, now.traffic)
            stay = min(len(workers), stages)
            assert ladder.workers()[:stay] == workers[:stay]
            assert now.recovery.steps_repeated == 0
            assert now.recovery.resumed_step > 0
            for leaver in ladder.leavers:
                until(lambda pod=leaver: (status := pod.status()) and status.released)
                leaver.terminate()
                assert leaver.exit_code() == ExitCode.DRAINED
        assert ladder.exit_codes() == [ExitCode.SUCCEEDED] * 2
        assert ladder.losses() == reference_losses(config, 60)
