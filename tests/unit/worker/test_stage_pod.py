"""Agents and workers together, as in pods: real processes from start to end."""

import json
import os
import signal
from pathlib import Path

from pipelinejob_worker.protocol import ExitCode, Membership, WorkerConfig
from tests.unit.worker.agents import Pod, until
from tests.unit.worker.forked import free_port
from tests.unit.worker.jobs import history, job
from tests.unit.worker.reference import reference_losses


def give(pods: list[Pod], config: WorkerConfig, epoch: int = 1) -> None:
    """What the operator writes when all pods have an address."""
    port = free_port()
    for stage, pod in enumerate(pods):
        pod.give(
            config,
            Membership(
                epoch=epoch,
                action="Run",
                stage=stage,
                stages=len(pods),
                master_address="localhost",
                master_port=port,
            ),
        )


def logged_losses(output: str) -> list[float]:
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return [line["loss"] for line in lines if line["event"] == "step"]


def test_without_a_volume_the_log_of_the_last_stage_has_every_loss(tmp_path: Path) -> None:
    config = job(tmp_path)
    config = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"volume_claim_name": ""})})
    with Pod(tmp_path, 0) as first, Pod(tmp_path, 1) as last:
        give([first, last], config)
        assert [first.exit_code(), last.exit_code()] == [ExitCode.SUCCEEDED] * 2, first.output + last.output
        assert logged_losses(last.output) == reference_losses(config, 12)
        assert logged_losses(first.output) == []
        assert (last.termination.reason, last.termination.step) == ("Succeeded", 12)


def test_a_pod_asked_to_leave_takes_all_with_it_and_a_killed_one_is_not_blamed_on_its_peers(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    config = job(tmp_path, steps=100_000, every_steps=100_000, partition="Even")

    before = tmp_path / "before"
    before.mkdir()
    with Pod(before, 0, checkpoints) as first, Pod(before, 1, checkpoints) as last:
        give([first, last], config)
        status = until(lambda: (s := first.status()) and s.progress.step >= 3 and s)
        assert [(stage.stage, stage.layers) for stage in status.progress.stages] == [(0, "0-2"), (1, "3-5")]
        assert status.progress.bubble_limit_percent == 20
        _, trace = until(lambda: (answer := first.get("/trace")) and answer[0] == 200 and answer)
        shown = {event["cat"] for event in json.loads(trace)["traceEvents"] if event["ph"] == "X"}
        assert shown >= {"forward", "backward", "waiting"}
        assert last.get("/trace")[0] == 404, "the trace of all stages is with rank 0"
        last.terminate()
        assert [first.exit_code(), last.exit_code()] == [ExitCode.DRAINED] * 2, first.output + last.output
        assert first.termination.step == last.termination.step == len(history(checkpoints))

    after = tmp_path / "after"
    after.mkdir()
    with Pod(after, 0, checkpoints, attempt=1) as first, Pod(after, 1, checkpoints, attempt=1) as last:
        give([first, last], config, epoch=2)
        drained = len(history(checkpoints))
        resumed = until(lambda: (s := first.status()) and s.progress.step > drained and s)
        assert resumed.progress.last_checkpoint_step == drained
        os.kill(worker_of(last), signal.SIGKILL)
        assert last.exit_code() == 137
        assert first.exit_code() == ExitCode.PEER_LOST
        assert (last.termination.reason, first.termination.reason) == ("Signal", "PeerLost")
    losses = history(checkpoints)
    assert losses == reference_losses(config, len(losses))


def test_a_worker_does_not_outlive_its_agent(tmp_path: Path) -> None:
    with Pod(tmp_path) as pod:
        give([pod], job(tmp_path, steps=100_000))
        pod.until_state("Running")
        worker = worker_of(pod)
        pod.process.kill()
        until(lambda: not Path("/proc", str(worker)).exists())


def worker_of(pod: Pod) -> int:
    """Process id of the agent's only child."""
    children = Path(f"/proc/{pod.process.pid}/task/{pod.process.pid}/children").read_text().split()
    assert len(children) == 1
    return int(children[0])
