"""A job whose agents recover by themselves: real agents, zygotes and workers on loopback, in directories for pods."""

import json
import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any, Self

from pipelinejob_worker.protocol import AgentStatus, Membership, WorkerConfig
from tests.unit.worker.agents import Pod, until
from tests.unit.worker.forked import free_port
from tests.unit.worker.jobs import job


def ladder_job(directory: Path, steps: int, **changes: Any) -> WorkerConfig:
    """A small job without checkpoints that takes a snapshot after every step."""
    recovery = {"strategy": "Ladder", "snapshotEverySteps": 1, "maxRestarts": 100} | changes.pop("recovery", {})
    volume = changes.pop("volume", "")
    config = job(directory, steps=steps, **{"dropout": "0.1", "partition": "Even"} | changes).model_dump(by_alias=True)
    config["checkpoint"]["volumeClaimName"] = volume
    return WorkerConfig.model_validate(config | {"jobUid": "uid-1", "recovery": recovery})


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class Ladder:
    """The pods of a job, and the operator's hand. ``pods`` by rank."""

    def __init__(
        self,
        directory: Path,
        config: WorkerConfig,
        stages: int,
        checkpoints: Path | None = None,
        *,
        pipelines: int = 1,
    ) -> None:
        self._directory = directory
        self._config = config
        self._checkpoints = checkpoints
        self._memory = Path(tempfile.mkdtemp(dir="/dev/shm"))
        self._made = 0
        self._outputs: list[Pod] = []
        self._coordinator_port = free_port()
        self.epoch = 1
        self.stages = stages
        self.pipelines = pipelines
        self.pods: list[Pod] = []
        self.leavers: list[Pod] = []

    def __enter__(self) -> Self:
        self.pods = [self.new_pod() for _ in range(self.stages * self.pipelines)]
        self.give()
        return self

    def __exit__(self, *_: object) -> None:
        for pod in self._outputs:
            pod.__exit__()
        shutil.rmtree(self._memory)

    def new_pod(self, **settings: Any) -> Pod:
        """A pod with an empty memory."""
        self._made += 1
        memory = self._memory / f"pod-{self._made}"
        memory.mkdir()
        return self._start({"recovery_directory": str(memory), "node": f"node-{self._made}"} | settings)

    def restart_container(self, rank: int) -> None:
        """The container ends without a word, and another begins in the same pod: the memory stays."""
        old = self.pods[rank]
        old.process.kill()
        old.process.wait()
        self.pods[rank] = self._start({name: old.settings[name] for name in ("recovery_directory", "node")})
        self._write(rank)

    def replace(self, rank: int) -> None:
        """The pod is gone with its memory, and the operator makes another."""
        old = self.pods[rank]
        old.process.kill()
        old.process.wait()
        shutil.rmtree(old.settings["recovery_directory"])
        self.pods[rank] = self.new_pod()
        self._write(rank)

    def scale(self, stages: int) -> None:
        """Another number of stages: pods are added, or leave once they have given all they hold."""
        self.epoch += 1
        self.leavers = self.pods[stages:]
        self.pods = self.pods[:stages] + [self.new_pod() for _ in range(stages - len(self.pods))]
        self.stages = stages
        self.give()

    def give(self) -> None:
        """Write everybody's membership."""
        for rank in range(len(self.pods)):
            self._write(rank)
        for place, pod in enumerate(self.leavers):
            pod.give(self._config, self.membership(0).model_copy(update={"action": "Leave", "leaver": place}))

    def membership(self, rank: int, action: str = "Run") -> Membership:
        return Membership(
            epoch=self.epoch,
            action=action,
            stage=rank % self.stages,
            stages=self.stages,
            pipeline=rank // self.stages,
            pipelines=self.pipelines,
            master_address="127.0.0.1",
            master_port=1,
            leavers=len(self.leavers),
        )

    def status(self, rank: int = 0) -> AgentStatus:
        """What an agent tells, as soon as it answers."""
        pod = self.pods[rank]

        def answer() -> AgentStatus | None:
            assert pod.process.poll() is None, pod.output
            return pod.status()

        return until(answer)

    def until_step(self, step: int, rank: int = 0) -> AgentStatus:
        return until(lambda: (s := self.status(rank)) and s.state == "Running" and s.progress.step >= step and s)

    def until_recovered(self, before: AgentStatus, rank: int = 0) -> AgentStatus:
        """Wait until a later incarnation than that of ``before`` has made a step."""

        def recovered() -> AgentStatus | None:
            now = self.status(rank)
            later = (now.epoch, now.incarnation_attempt) > (before.epoch, before.incarnation_attempt)
            trains = now.state == "Running" and now.progress.step > now.recovery.resumed_step
            return now if later and trains else None

        return until(recovered)

    def worker(self, rank: int) -> int:
        """Process id of a rank's worker."""
        (zygote,) = children(self.pods[rank].process.pid)
        return until(lambda: next(iter(children(zygote)), None))

    def workers(self) -> list[int]:
        return [self.worker(rank) for rank in range(len(self.pods))]

    def hit(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to a rank's worker."""
        os.kill(self.worker(rank), number)

    def exit_codes(self) -> list[int]:
        return [pod.exit_code() for pod in self.pods]

    @property
    def output(self) -> str:
        return "\n".join(pod.output for pod in self._outputs)

    def losses(self) -> list[float]:
        """The losses of all steps, which must be the same wherever one was computed twice."""
        found: dict[int, float] = {}
        for line in self.output.splitlines():
            event = json.loads(line) if line.startswith("{") else {}
            if event.get("event") == "step":
                assert found.setdefault(event["step"], event["loss"]) == event["loss"], f"step {event['step']}"
        assert sorted(found) == list(range(1, len(found) + 1))
        return [found[step] for step in sorted(found)]

    def _write(self, rank: int) -> None:
        self.pods[rank].give(self._config, self.membership(rank))

    def _start(self, settings: dict[str, Any]) -> Pod:
        directory = self._directory / f"container-{len(self._outputs)}"
        directory.mkdir()
        pod = Pod(directory, 0, self._checkpoints, coordinator_port=self._coordinator_port, **settings)
        pod.__enter__()
        self._outputs.append(pod)
        return pod
