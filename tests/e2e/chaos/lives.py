"""Who holds a stage: its pod, its agent, its worker; and what a fault may end of it."""

from enum import IntEnum
from typing import NamedTuple, Self

from tests.cluster import faults


class Loss(IntEnum):
    """What ends in a pod that is struck; all that is smaller ends with it."""

    NOTHING = 0
    WORKER = 1
    AGENT = 2
    POD = 3


Identity = tuple[int, int]
"""A process id, and the time of its start."""


class Lives(NamedTuple):
    """Each member changes when a new one has taken over: a UID, and process ids with the time of their start."""

    pod: str
    agent: Identity
    worker: Identity | None

    @classmethod
    def in_pod(cls, uid: str) -> Self:
        """Look at the processes of a stage pod."""
        found = faults.stage_processes(uid)
        worker = found.worker
        return cls(uid, (found.agent.pid, found.agent.started), (worker.pid, worker.started) if worker else None)

    def lost(self, later: Self) -> Loss:
        """Return what has ended between two looks."""
        if later.pod != self.pod:
            return Loss.POD
        if later.agent != self.agent:
            return Loss.AGENT
        return Loss.WORKER if later.worker != self.worker else Loss.NOTHING


def runs(identity: Identity) -> bool:
    """Whether a process has not ended."""
    found = faults.Process.read(identity[0])
    return found is not None and found.started == identity[1]
