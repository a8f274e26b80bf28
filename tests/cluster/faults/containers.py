"""Processes of a pod: found from the host by the control groups that the kubelet keeps for it, and killed or stopped.

So a fault needs neither the API server nor the kubelet, and hits at the moment it is asked for.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.cluster import cgroups, commands, processes
from tests.cluster.errors import ClusterError

ZYGOTE = "pipelinejob_worker.agent.zygote"
SANDBOX_PROGRAM = "/pause"

HEADROOM = 32 << 20
"""What a container may still use when its limit is lowered, so that the limit can be set at once."""

FILL = """
import os, pathlib, sys
pathlib.Path("/proc/self/oom_score_adj").write_text("1000")
pathlib.Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
kept = []
while True:
    kept.append(b"x" * (8 << 20))
"""
FILL_SECONDS = 60


@dataclass(frozen=True)
class Process:
    """A process of a pod. Its id and start together name it for ever."""

    pid: int
    started: int
    """In ticks of the kernel after its own start."""

    parent: int
    pid_inside: int
    """Its id as the container sees it."""

    command: tuple[str, ...]

    @classmethod
    def read(cls, pid: int) -> Self | None:
        """Return a process that runs, or None: it has ended."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            status = Path(f"/proc/{pid}/status").read_text().splitlines()
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            return None
        if fields[0] in "ZX":
            return None
        (inside,) = (int(line.split()[-1]) for line in status if line.startswith("NSpid:"))
        words = tuple(command.decode(errors="replace").rstrip("\0").split("\0"))
        return cls(pid, int(fields[19]), int(fields[1]), inside, words)

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        now = Process.read(self.pid)
        return now is not None and now.started == self.started

    @property
    def stopped(self) -> bool:
        """Whether a signal has stopped it."""
        return self.runs and Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    def send(self, number: signal.Signals) -> None:
        """Send a signal to this process, and never to another one that has got its id."""
        with suppress(ProcessLookupError):
            descriptor = os.pidfd_open(self.pid)
            try:
                if self.runs:
                    signal.pidfd_send_signal(descriptor, number)
            finally:
                os.close(descriptor)

    def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal and wait for the end."""
        self.send(number)
        commands.wait_until(f"process {self.pid} ends by {number.name}", lambda: not self.runs, seconds=10)


@dataclass(frozen=True)
class StageProcesses:
    """What runs in a stage pod."""

    agent: Process
    zygote: Process | None
    worker: Process | None
    """None, as the zygote, while there is none: a new one is about to be started."""


def stage_processes(pod_uid: str) -> StageProcesses:
    """Find the processes of a stage pod.

    Raises:
        ClusterError: there is no agent, or more of anything than one.

    """
    found = _processes(_container(pod_uid))
    zygotes = [process for process in found if ZYGOTE in process.command]
    # A worker is a fork of the zygote, so it has the zygote's command line.
    forks = [process for process in zygotes if any(process.parent == other.pid for other in zygotes)]
    agents = [process for process in found if process.pid_inside == 1]
    originals = [process for process in zygotes if process not in forks]
    if len(agents) != 1 or len(originals) > 1 or len(forks) > 1:
        raise ClusterError(f"pod {pod_uid} has not one agent, and at most one zygote and one worker: {found}")
    return StageProcesses(agents[0], next(iter(originals), None), next(iter(forks), None))


@contextmanager
def stopped(process: Process) -> Iterator[None]:
    """Stop a process, as one that hangs; let it go on afterwards, if it has not been killed."""
    process.send(signal.SIGSTOP)
    commands.wait_until(f"process {process.pid} is stopped", lambda: process.stopped, seconds=5)
    try:
        yield
    finally:
        process.send(signal.SIGCONT)


def kill_container(pod_uid: str) -> None:
    """Kill process 1 of a pod's container, and with it, as the kernel does, all others in there."""
    _first(pod_uid).end()


def kill_sandbox(pod_uid: str) -> None:
    """Kill the process that holds a pod's network: the kubelet makes another sandbox, with another address."""
    for group in cgroups.of_pod(pod_uid):
        for process in _processes(group):
            if process.command[0] == SANDBOX_PROGRAM:
                process.end()
                return
    raise ClusterError(f"pod {pod_uid} has no sandbox")


def out_of_memory(pod_uid: str) -> None:
    """Let a pod's container run out of memory: the kernel's out-of-memory killer ends all its processes.

    The container's limit is lowered to little more than what it uses, and a process that does nothing but fill memory
    joins it. On control groups version 2 the kubelet has asked the kernel to kill the group as a whole. On version 1 it
    kills that process alone; the others are killed from here, after it. So on both the runtime hears of the event and
    reports ``OOMKilled``, and nobody in the container outlives it.
    """
    group = _container(pod_uid)
    first = _first(pod_uid)
    usage, limit = cgroups.memory_files(group)
    limit.write_text(str(int(usage.read_text()) + HEADROOM))
    filling = subprocess.run(
        [sys.executable, "-c", FILL, group], capture_output=True, text=True, timeout=FILL_SECONDS, check=False
    )
    if filling.returncode != -signal.SIGKILL:
        raise ClusterError(f"filling the memory of {group} was not stopped by SIGKILL: {filling.stderr.strip()}")
    first.end()


def _first(pod_uid: str) -> Process:
    """Process 1 of the container."""
    (first,) = (process for process in _processes(_container(pod_uid)) if process.pid_inside == 1)
    return first


def _container(pod_uid: str) -> Path:
    """The control group of the pod's container, while it runs."""
    found = [
        group
        for group in cgroups.of_pod(pod_uid)
        if any(process.command[0] != SANDBOX_PROGRAM for process in _processes(group))
    ]
    if len(found) != 1:
        raise ClusterError(f"pod {pod_uid} has not one container that runs: {[str(group) for group in found]}")
    return found[0]


def _processes(group: Path) -> list[Process]:
    pids = cgroups.listed(group)
    return [process for pid in pids if processes.running(pid) and (process := Process.read(pid))]
