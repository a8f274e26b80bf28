"""A job whose agents recover by themselves, and its pods, over several looks: what its stories are told with."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from pipelinejob_operator.api.status import Status
from pipelinejob_operator.build.job import Job
from pipelinejob_operator.build.membership import member, shape_of
from pipelinejob_operator.build.place import Place, Shape
from pipelinejob_operator.controller.actions import Action, CreatePod, DeletePod, SetMembership
from pipelinejob_operator.controller.plan import Plan
from pipelinejob_operator.policy.facts import SparePod, StagePod
from pipelinejob_worker.protocol import (
    AgentStatus,
    Membership,
)
from tests.unit.operator import builders
from tests.unit.operator.builders import NOW, decide, manifest

FOUR = Shape(4)


def job(status: Status | None = None, **spec: Any) -> Job:
    recovery = {"strategy": "Ladder"} | spec.pop("recovery", {})
    return Job.read(manifest(status, **{"stages": 4, "recovery": recovery, **spec}))


def pod(stage: int, replacement: int = 0, **facts: Any) -> StagePod:
    """A pod as its agent trains in it; what the group tells it is what it shows."""
    pipeline, shape = facts.pop("pipeline", 0), facts.pop("shape", FOUR)
    name = f"tiny-s{stage}-a0" if shape.pipelines == 1 else f"tiny-p{pipeline}-s{stage}-a0"
    made = builders.pod(stage, pipeline=pipeline, shape=shape, replacement=replacement, membership="")
    return replace(made, **({"name": name + (f"-r{replacement}" if replacement else "")} | facts))


def gang(size: int = 4, *but: StagePod, without: Sequence[int] = ()) -> list[StagePod]:
    """Pods of all stages, some of them other ones."""
    others = {one.place.stage: one for one in but}
    return [others.get(stage, pod(stage)) for stage in range(size) if stage not in without]


def spare(index: int = 0, number: int = 0, **facts: Any) -> SparePod:
    healthy: dict[str, Any] = {"node": "node-9", "address": "10.0.0.9", "ready": True, "scheduled": True}
    name = f"tiny-spare-{index}-a{number}"
    known = {"name": name, "uid": f"uid-{name}", "attempt": 0, "started": True, "phase": "Running", "membership": ""}
    return SparePod(index=index, **(known | healthy | facts))


class World:
    """A job and its pods over several looks: what the plans ask for is done to them, as an API server would."""

    def __init__(self, some: Job, *pods: StagePod, spares: Sequence[SparePod] = ()) -> None:
        self.job, self.pods, self.spares, self.now = some, list(pods), list(spares), NOW
        self.done: list[Action] = []
        self.made: Plan | None = None

    def look(self, **seen: Any) -> Plan:
        """One look; the status is written and memberships reach the pods, everything else is only noted."""
        self.made = decide(self.job, *self.pods, now=self.now, spares=self.spares, **seen)
        self.job = replace(self.job, status=self.made.status)
        self.done += self.made.actions
        told = {
            action.pod.name: action.value
            for action in self.made.actions
            if isinstance(action, SetMembership) and isinstance(action.pod, StagePod)
        }
        self.pods = [replace(one, membership=told.get(one.name, one.membership)) for one in self.pods]
        return self.made

    def settle(self, **seen: Any) -> Plan:
        """Look until nothing changes."""
        for _ in range(10):
            before = (self.job.status, list(self.pods))
            made = self.look(**seen)
            if (self.job.status, list(self.pods)) == before:
                return made
        raise AssertionError(f"it never comes to rest: {self.made}")

    def spec(self, **members: Any) -> None:
        """Edit the spec."""
        spec = manifest(stages=4, recovery={"strategy": "Ladder"})["spec"] | members
        self.job = Job.read({**manifest(self.job.status), "spec": spec})

    def swap(self, *pods: StagePod) -> None:
        """Let pods be as the test says, with the membership that they show."""
        shown = {one.name: one.membership for one in self.pods}
        names = {one.name for one in pods}
        kept = [one for one in self.pods if one.name not in names]
        self.pods = [*kept, *(replace(one, membership=shown.get(one.name, one.membership)) for one in pods)]

    def lose(self, *names: str) -> None:
        self.pods = [one for one in self.pods if one.name not in names]

    def memberships(self) -> dict[str, Membership]:
        return {one.name: Membership.model_validate_json(one.membership) for one in self.pods if one.membership}

    def take(self) -> list[Action]:
        """What has been asked for since the last time."""
        done, self.done = self.done, []
        return done


def running(some: Job | None = None, *pods: StagePod, spares: Sequence[SparePod] = ()) -> World:
    """A job whose group trains."""
    world = World(some or job(), *(pods or gang()), spares=spares)
    world.settle()
    world.take()
    return world


def created(actions: Sequence[Action]) -> list[str]:
    return [action.manifest["metadata"]["name"] for action in actions if isinstance(action, CreatePod)]


def deleted(actions: Sequence[Action]) -> list[str]:
    return [action.pod.name for action in actions if isinstance(action, DeletePod)]


def agent(epoch: int = 1, state: str = "Running", **told: Any) -> AgentStatus:
    return AgentStatus(job_uid=builders.UID, stage=0, epoch=epoch, state=state, **told)


def stuck(stage: int, replacement: int = 0, since: datetime = NOW) -> StagePod:
    return pod(
        stage,
        replacement,
        scheduled=False,
        node="",
        address="",
        ready=False,
        started=False,
        phase="Pending",
        unschedulable="0/4 nodes are available",
        unschedulable_since=since,
    )


def world_text(world: World, rank: int) -> str:
    """The membership that the group has for a rank."""
    group = world.job.status.group
    assert group is not None
    place = Place(rank, 0, shape_of(group))
    return member(world.job.status.epoch, group, place, {}).to_json()
