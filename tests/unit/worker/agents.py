"""Real agents in processes of their own, in a directory that stands for the pod's file system."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

from pipelinejob_worker.protocol import AgentStatus, Membership, Termination, WorkerConfig
from tests.unit.worker.forked import free_port

ROOT = Path(__file__).parents[3]
PATIENCE_SECONDS = 60.0

Value = TypeVar("Value")


def until(what: Callable[[], Value | None]) -> Value:
    """Wait until ``what`` returns something true."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (value := what()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return value


class Pod:
    """A stage pod: its volumes are directories, its container is an agent's process."""

    def __init__(
        self, directory: Path, stage: int = 0, checkpoints: Path | None = None, script: str = "", **settings: Any
    ) -> None:
        """``script``: Python that the worker runs in place of training, with its link to the agent as ``link``."""
        self.info = directory / f"pod-info-{stage}"
        self.info.mkdir()
        self._termination = directory / f"termination-{stage}"
        self._output = directory / f"output-{stage}"
        self.port = free_port()
        self._script = script
        self.settings = {
            "job": "small",
            "job_uid": "uid-1",
            "stage": stage,
            "attempt": 0,
            "pod_info": str(self.info),
            "checkpoint_directory": str(checkpoints or directory),
            "scratch_directory": str(self.info),
            "termination_log": str(self._termination),
            "recovery_directory": str(self.info),
            "status_port": self.port,
            "address": "127.0.0.1",
            "pieces_port": free_port(),
            "entry": "tests.unit.worker.scripted:work" if script else "",
        } | settings

    def __enter__(self) -> Self:
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.unit.worker.launch_agent", json.dumps(self.settings)],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment
                | {"PYTHONPATH": f"{ROOT}/worker:{ROOT}", "GLOO_SOCKET_IFNAME": "lo", "WORKER_SCRIPT": self._script},
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def write(self, name: str, content: str) -> None:
        """Replace a file of the downward-API volume atomically."""
        new = self.info / f".{name}"
        new.write_text(content)
        new.replace(self.info / name)

    def give(self, config: WorkerConfig, membership: Membership) -> None:
        """Write configuration and membership, as the operator does."""
        self.write("config", config.to_json())
        self.write("membership", membership.to_json())

    def get(self, path: str) -> tuple[int, str] | None:
        """Status code and text of an HTTP answer; None while nobody listens."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return None

    def status(self) -> AgentStatus | None:
        answer = self.get("/status")
        return AgentStatus.model_validate_json(answer[1]) if answer else None

    def until_state(self, state: str) -> AgentStatus:
        """Wait for a state; the agent must not end before."""

        def reached() -> AgentStatus | None:
            status = self.status()
            assert status or self.process.poll() is None, self.output
            return status if status and status.state == state else None

        return until(reached)

    def terminate(self) -> None:
        """What the kubelet does first."""
        self.process.send_signal(signal.SIGTERM)

    def exit_code(self) -> int:
        return self.process.wait(PATIENCE_SECONDS)

    @property
    def termination(self) -> Termination:
        return Termination.model_validate_json(self._termination.read_bytes())

    @property
    def termination_size(self) -> int:
        return self._termination.stat().st_size

    @property
    def output(self) -> str:
        return self._output.read_text()
