"""Agents that recover among themselves, with real workers: the losses are those of one process, bit by bit."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from pipelinejob_worker.protocol import ExitCode, Membership, WorkerConfig
from pipelinejob_worker.train.protect import FIRST_MEASURE_STEPS, MEASURE_STEPS, measures_after
from tests.unit.worker.agents import Pod, until
from tests.unit.worker.jobs import history
from tests.unit.worker.ladders import Ladder, children, ladder_job
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


def test_a_pod_that_is_asked_to_leave_hands_its_step_over_and_no_step_is_repeated(tmp_path: Path) -> None:
    config = ladder_job(tmp_path, steps=40)
    with Ladder(tmp_path, config, 2) as ladder:
        for rank, witness in ((1, 0), (0, 1)):
            before = ladder.until_step(3, witness)
            leaving = ladder.pods[rank]
            leaving.terminate()
            assert leaving.exit_code() == ExitCode.DRAINED
            assert leaving.termination.reason == "Drained"
            until(lambda witness=witness: ladder.status(witness).state == "Recovering")
            ladder.replace(rank)
            now = ladder.until_recovered(before, witness)
            assert now.recovery.steps_repeated == 0
            assert now.recovery.resumed_step >= leaving.termination.step
            assert ladder.status(rank).failures == ()
        assert ladder.exit_codes() == [ExitCode.SUCCEEDED] * 2
        assert ladder.losses() == reference_losses(config, 40)


def test_a_stopped_job_leaves_a_checkpoint_which_a_later_one_begins_with(tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    config = ladder_job(tmp_path, steps=30, volume="saves", every_steps=1000)
    with Ladder(tmp_path, config, 2, volume) as ladder:
        ladder.until_step(4)
        ladder.epoch += 1
        for rank, pod in enumerate(ladder.pods):
            pod.give(config, ladder.membership(rank, "Stop"))
        assert ladder.exit_codes() == [ExitCode.DRAINED] * 2
        saved = int((volume / "latest").read_text().removeprefix("step-"))
        assert saved == ladder.pods[0].termination.step == len(history(volume))
        ladder.epoch += 1
        ladder.pods = [ladder.new_pod() for _ in range(2)]
        ladder.give()
        resumed = ladder.until_step(saved + 2)
        assert resumed.progress.last_checkpoint_step == saved
        ladder.replace(0)
        ladder.replace(1)  # both places of every snapshot: only the checkpoint is left
        assert ladder.exit_codes() == [ExitCode.SUCCEEDED] * 2
        assert history(volume) == reference_losses(config, 30)
        assert (volume / "latest").read_text() == "step-000000030\n"


def test_copies_of_the_pipeline_own_shares_of_the_layers_and_all_come_back(tmp_path: Path) -> None:
    config = ladder_job(tmp_path, steps=30)
    with Ladder(tmp_path, config, 1, pipelines=2) as ladder:
        before = ladder.until_step(3)
        ladder.hit(1, signal.SIGKILL)
        before = ladder.until_recovered(before)
        assert before.recovery.steps_repeated <= 1
        ladder.replace(1)
        now = ladder.until_recovered(before)
        assert now.recovery.steps_repeated <= 1
        assert now.recovery.resumed_step > 0
        assert ladder.exit_codes() == [ExitCode.SUCCEEDED] * 2
        assert ladder.losses() == reference_losses(config, 30, copies=2)


def test_without_room_training_goes_on_unprotected_and_the_status_says_what_is_needed(tmp_path: Path) -> None:
    config = ladder_job(tmp_path, steps=20, recovery={"memoryBytes": 10_000})
    with Ladder(tmp_path, config, 2) as ladder:
        before = ladder.until_step(3)
        assert "spec.recovery: the snapshots need" in before.protection.problem
        assert "allowed: 10000 in all" in before.protection.problem
        assert before.protection.at_risk_steps >= 3
        ladder.hit(1, signal.SIGKILL)
        now = ladder.until_recovered(before)
        assert now.recovery.resumed_step == 0
        assert ladder.exit_codes() == [ExitCode.SUCCEEDED] * 2
        assert ladder.losses() == reference_losses(config, 20)


def test_the_interval_of_snapshots_is_found_by_measuring(tmp_path: Path) -> None:
    config = ladder_job(tmp_path, steps=120, recovery={"snapshotEverySteps": 0})
    with Ladder(tmp_path, config, 2) as ladder:
        found = until(lambda: (s := ladder.status()) and s.protection and s.protection.interval_steps > 1 and s)
        assert found.progress.step >= FIRST_MEASURE_STEPS
        before = until(lambda: (s := ladder.status()).protection.cost_percent <= 3 and s)
        ladder.hit(1, signal.SIGKILL)
        now = ladder.until_recovered(before)
        assert now.recovery.steps_repeated <= 2 * before.protection.interval_steps
        assert ladder.exit_codes() == [ExitCode.SUCCEEDED] * 2
        assert ladder.losses() == reference_losses(config, 120)


def test_the_interval_is_found_early_and_again_when_the_slow_first_steps_are_over() -> None:
    assert [steps for steps in range(1, 3 * MEASURE_STEPS + 1) if measures_after(steps)] == [4, 8, 16, 32, 64, 96]


def test_a_frozen_pod_is_replaced_and_does_no_harm_when_it_thaws(tmp_path: Path) -> None:
    config = ladder_job(tmp_path, steps=80)
    with Ladder(tmp_path, config, 2) as ladder:
        before, frozen = ladder.until_step(3), ladder.pods[1]
        tree = [frozen.process.pid, *children(frozen.process.pid), ladder.worker(1)]
        for pid in tree:
            os.kill(pid, signal.SIGSTOP)
        until(lambda: ladder.status().state == "Recovering")
        ladder.pods[1] = ladder.new_pod()
        ladder.give()
        now = ladder.until_recovered(before)
        assert now.recovery.steps_repeated <= 1
        for pid in reversed(tree):
            os.kill(pid, signal.SIGCONT)
        until(lambda: (status := frozen.status()) and "rank 1 is taken by another agent" in status.refused)
        frozen.terminate()
        assert frozen.exit_code() == ExitCode.DRAINED
        assert ladder.exit_codes() == [ExitCode.SUCCEEDED] * 2
        assert ladder.losses() == reference_losses(config, 80)


def test_a_spare_imports_everything_and_takes_a_stage_over_at_once(tmp_path: Path) -> None:
    config = ladder_job(tmp_path, steps=40)
    with Ladder(tmp_path, config, 2) as ladder:
        spare = ladder.new_pod(spare=True)
        spare.write("config", config.to_json())
        before = ladder.until_step(3)
        spare.until_state("Standby")
        ladder.pods[1].process.kill()
        ladder.pods[1] = spare
        ladder.give()
        now = ladder.until_recovered(before)
        assert now.recovery.steps_repeated <= 1
        assert until(lambda: ladder.status(0).recovery.last_pause_seconds) < 4  # told with the first step
        assert spare.status().stage == 1
        assert ladder.exit_codes() == [ExitCode.SUCCEEDED] * 2
        assert ladder.losses() == reference_losses(config, 40)


def alone(directory: Path, script: str, memory: Path, **recovery: Any) -> tuple[Pod, WorkerConfig]:
    """A job of one stage whose worker runs a script."""
    return Pod(directory, script=script, recovery_directory=str(memory)), ladder_job(directory, 10, recovery=recovery)


def run_alone(pod: Pod, config: WorkerConfig) -> int:
    pod.give(config, Membership(epoch=1, action="Run", stage=0, stages=1, master_address="127.0.0.1", master_port=1))
    return pod.exit_code()


def test_a_worker_that_ends_too_often_ends_the_job_with_the_cause(tmp_path: Path, memory: Path) -> None:
    script = "import sys\nprint('cannot read the moon')\nsys.exit(3)"
    pod, config = alone(tmp_path, script, memory, maxRestarts=2)
    with pod:
        assert run_alone(pod, config) == ExitCode.BUDGET_SPENT
    ended = pod.termination
    assert ended.reason == "BudgetSpent"
    assert "has ended 3 times within 3600 s; allowed: 2" in ended.message
    assert "exited with code 3" in ended.message
    assert ended.log_tail[-1] == "cannot read the moon"


@pytest.mark.parametrize(
    "last",
    ['link.sendall(b\'{"kind": "rea\')', "link.shutdown(socket.SHUT_RD)\n    time.sleep(0.3)"],
    ids=["in the middle of a line", "while it is told something"],
)
def test_a_worker_may_be_killed_at_any_moment_of_its_talk(tmp_path: Path, memory: Path, last: str) -> None:
    script = f"""
import json, os, socket, time
lines = link.makefile("rb")
while True:
    assignment = json.loads(lines.readline())
    link.sendall(b'{{"kind": "joined", "layers": "0-5"}}\\n{{"kind": "valid", "step": 1}}\\n')
    {last}
    os.kill(os.getpid(), 9)
"""
    pod, config = alone(tmp_path, script, memory, maxRestarts=1)
    with pod:
        assert run_alone(pod, config) == ExitCode.BUDGET_SPENT
    assert "SIGKILL" in pod.termination.message


HANG = """
import json, time
from pathlib import Path
from pipelinejob_worker.recovery.pulse import Doing, Heart, Pulse
assignment = json.loads(link.makefile("rb").readline())
pulse = Pulse.open(Path(assignment["part"]["pulse"]))
heart = Heart(pulse, lambda: None)
for event in (
    {"kind": "joined", "layers": "0-5"},
    {"kind": "reached", "progress": {"step": 1, "totalSteps": 10, "stepSeconds": 0.1}},
):
    link.sendall(json.dumps(event).encode() + b"\\n")
pulse.move(Doing.COMPUTING)
time.sleep(600)
"""


def test_a_main_thread_that_hangs_while_its_process_lives_is_found(tmp_path: Path, memory: Path) -> None:
    pod, config = alone(tmp_path, HANG, memory, maxRestarts=0, hangTimeoutSeconds=1)
    with pod:
        assert run_alone(pod, config) == ExitCode.BUDGET_SPENT
    assert "the worker computed for longer than a step may take, and was killed" in pod.termination.message


def test_what_no_restart_can_cure_ends_the_job_at_once(tmp_path: Path, memory: Path) -> None:
    script = (
        'link.sendall(b\'{"kind": "failed", "reason": "Configuration", "message": "cure"}\\n\')\nraise SystemExit(64)'
    )
    pod, config = alone(tmp_path, script, memory)
    with pod:
        assert run_alone(pod, config) == ExitCode.CONFIGURATION
    assert (pod.termination.reason, pod.termination.message) == ("Configuration", "cure")
