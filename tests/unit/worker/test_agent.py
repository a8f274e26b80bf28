"""The agent, as a real process with real files and sockets; only the worker is a script of a few lines."""

import json
import socket
from pathlib import Path

import pytest

from pipelinejob_worker.protocol import ExitCode, Membership
from tests.unit.worker.agents import Pod, until
from tests.unit.worker.jobs import job

LINK = """
import json, os, signal, sys, time
lines = link.makefile("rb")
def tell(**event):
    link.sendall(json.dumps(event).encode() + b"\\n")
"""
JOIN = """
assignment = json.loads(lines.readline())
tell(kind="joined", layers="0-2")
"""
PROGRESS = """
stages = [{"stage": 0, "busyPercent": 71, "layers": "0-2"}]
tell(kind="reached", progress={"step": 3, "totalSteps": 12, "loss": 2.5, "bubblePercent": 29.0, "stages": stages})
"""
OBEY = """
assert json.loads(lines.readline()) == {"kind": "drain", "checkpoint": True}
sys.exit(79)
"""
IGNORE = """
time.sleep(600)
"""


def pod(directory: Path, *script: str, **settings: object) -> Pod:
    """A pod whose worker runs these parts."""
    return Pod(directory, script=LINK + "".join(script), **settings)


def membership(epoch: int = 1, **members: object) -> Membership:
    values = {"action": "Run", "stage": 0, "stages": 1, "master_address": "127.0.0.1", "master_port": 29500}
    return Membership.model_validate({"epoch": epoch, **values, **members})


def test_a_stage_waits_for_its_membership_then_runs_then_drains(tmp_path: Path) -> None:
    with pod(tmp_path, JOIN, PROGRESS, OBEY) as stage:
        waiting = stage.until_state("Waiting")
        assert (waiting.epoch, waiting.job_uid) == (0, "uid-1")
        assert stage.get("/healthz") == (200, "ok\n")
        assert stage.get("/readyz") == (503, "Waiting\n")

        stage.write("membership", "")  # as it is until the operator has written it
        stage.give(job(tmp_path), membership(epoch=4))
        running = stage.until_state("Running")
        assert (running.epoch, running.layers) == (4, "0-2")
        assert stage.get("/readyz") == (200, "Running\n")
        progress = until(lambda: (status := stage.status()) and status.progress.step and status.progress)
        assert (progress.step, progress.total_steps, progress.loss) == (3, 12, 2.5)
        metrics = stage.get("/metrics")[1]
        assert 'pipelinejob_stage_loss{stage="0"} 2.5\n' in metrics
        assert 'pipelinejob_stage_busy_ratio{stage="0"} 0.71\n' in metrics
        assert "tokens_per_second" not in metrics, "what is not known is not shown"

        stage.terminate()
        assert stage.exit_code() == ExitCode.DRAINED
        assert stage.termination.reason == "Drained"
        assert stage.termination.step == 3


def test_a_worker_gets_what_the_operator_wrote(tmp_path: Path) -> None:
    say = "print('assigned', json.dumps(assignment), flush=True)\n"
    with pod(tmp_path, JOIN, say, OBEY, attempt=3) as stage:
        stage.give(job(tmp_path, steps=17), membership(epoch=2))
        stage.until_state("Running")
        stage.terminate()
        stage.exit_code()
        assigned = next(line for line in stage.output.splitlines() if line.startswith("assigned "))
        assignment = json.loads(assigned.removeprefix("assigned "))
    assert assignment["config"]["train"]["steps"] == 17
    assert assignment["membership"]["epoch"] == 2
    assert assignment["attempt"] == 3
    assert assignment["checkpointDirectory"] == str(tmp_path)


def test_membership_stop_drains(tmp_path: Path) -> None:
    with pod(tmp_path, JOIN, OBEY) as stage:
        stage.give(job(tmp_path), membership(epoch=1))
        stage.until_state("Running")
        stage.write("membership", membership(epoch=2, action="Stop").to_json())
        assert stage.exit_code() == ExitCode.DRAINED


@pytest.mark.parametrize("given", [False, True], ids=["before the membership", "before the group has formed"])
def test_a_stage_without_a_group_leaves_at_once(tmp_path: Path, given: bool) -> None:
    with pod(tmp_path, IGNORE) as stage:
        stage.until_state("Waiting")
        if given:
            stage.give(job(tmp_path), membership())
            stage.until_state("Starting")
        stage.terminate()
        assert stage.exit_code() == ExitCode.DRAINED
        assert "before the group had formed" in stage.termination.message


def test_a_worker_that_does_not_drain_is_killed_after_the_deadline(tmp_path: Path) -> None:
    say = "print('pid', os.getpid(), flush=True)\n"
    with pod(tmp_path, JOIN, say, IGNORE, drain_seconds=0.3) as stage:
        stage.give(job(tmp_path), membership())
        stage.until_state("Running")
        stage.terminate()
        assert stage.exit_code() == 137
        assert stage.termination.reason == "DrainDeadline"
        worker = next(line.split()[1] for line in stage.output.splitlines() if line.startswith("pid "))
        until(lambda: not Path("/proc", worker).exists())


@pytest.mark.parametrize(
    ("script", "code", "reason", "message"),
    [
        ("sys.exit(3)", 3, "Error", "exited with code 3"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "Signal", "SIGKILL"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 139, "Signal", "SIGSEGV"),
        ("sys.exit(0)", 1, "Error", "code 0 after step 3 of 12"),
        (
            "tell(kind='failed', reason='PeerLost', message='a link broke'); sys.exit(75)",
            75,
            "PeerLost",
            "a link broke",
        ),
        ("tell(kind='failed', reason='Configuration', message='cure'); sys.exit(64)", 64, "Configuration", "cure"),
        ("tell(kind='reached', progress={'step': 12, 'totalSteps': 12})", 0, "Succeeded", "all 12 steps"),
    ],
)
def test_the_end_of_the_worker_is_the_end_of_the_pod(
    tmp_path: Path, script: str, code: int, reason: str, message: str
) -> None:
    with pod(tmp_path, JOIN, PROGRESS, script) as stage:
        stage.give(job(tmp_path), membership())
        assert stage.exit_code() == code
        ended = stage.termination
    assert (ended.exit_code, ended.reason, ended.stage) == (code, reason, 0)
    assert message in ended.message


def test_the_last_lines_of_the_worker_are_kept_and_all_are_passed_on(tmp_path: Path) -> None:
    script = "print('x' * 100_000)\nfor n in range(1000): print('line', n, 'é' * 50)\nsys.exit('the last word')\n"
    with pod(tmp_path, script) as stage:
        stage.write("config", job(tmp_path).to_json())
        assert stage.exit_code() == 1
        assert stage.termination.log_tail[-1] == "the last word"
        assert stage.termination.log_tail[-2].startswith("line 999 ")
        assert stage.termination_size <= 4096
        lines = stage.output.splitlines()
    assert "x" * 100_000 in lines
    assert sum(line.startswith("line ") for line in lines) == 1000


def test_an_old_epoch_is_ignored(tmp_path: Path) -> None:
    with pod(tmp_path, JOIN, OBEY) as stage:
        stage.give(job(tmp_path), membership(epoch=5))
        stage.until_state("Running")
        stage.write("membership", membership(epoch=4, action="Stop").to_json())
        stage.write("membership", membership(epoch=6).to_json())
        assert until(lambda: (status := stage.status()) and status.epoch == 6 and status).state == "Running"


def test_a_stage_leaves_when_its_group_is_replaced(tmp_path: Path) -> None:
    with pod(tmp_path, JOIN, IGNORE) as stage:
        stage.give(job(tmp_path), membership(epoch=1))
        stage.until_state("Running")
        stage.write("membership", membership(epoch=2, master_address="10.0.0.9").to_json())
        assert stage.exit_code() == ExitCode.PEER_LOST
        assert stage.termination.reason == "Superseded"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (membership(stage=1, stages=2).to_json(), "is of stage 1 of pipeline 0; allowed: this pod's stage 0 of"),
        (membership(oldest_reader=99).to_json(), "needs protocol 99 or newer; this worker image has"),
        ("{", "not valid"),
        ("[]", "not valid"),
        ('{"protocolVersion": 1}', "not valid"),
    ],
)
def test_an_impossible_membership_is_a_final_failure(tmp_path: Path, text: str, message: str) -> None:
    with pod(tmp_path, IGNORE) as stage:
        stage.write("config", job(tmp_path).to_json())
        stage.write("membership", text)
        assert stage.exit_code() == ExitCode.CONFIGURATION
        assert message in stage.termination.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"job": "small"}', "jobUid"),
        (
            '{"oldestReader": 99, "train": "of an unknown kind"}',
            "configuration: needs protocol 99 or newer",
        ),
    ],
)
def test_an_impossible_configuration_is_a_final_failure(tmp_path: Path, text: str, message: str) -> None:
    with pod(tmp_path, IGNORE) as stage:
        stage.write("config", text)
        assert stage.exit_code() == ExitCode.CONFIGURATION
        assert message in stage.termination.message


def test_an_agent_that_cannot_serve_says_so(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        with pod(tmp_path, IGNORE, status_port=taken.getsockname()[1]) as stage:
            assert stage.exit_code() == 1
            assert stage.termination.reason == "OSError"
