"""What the operator does about a job whose agents recover by themselves, told as a story."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest

from pipelinejob_operator.api.status import Status
from pipelinejob_operator.build.job import Job
from pipelinejob_operator.build.membership import member, shape_of
from pipelinejob_operator.build.names import SPARE_LABEL, STAGE_LABEL
from pipelinejob_operator.build.place import Place, Shape
from pipelinejob_operator.controller.actions import Action, CreatePod, DeletePod, OpenGate, SetMembership
from pipelinejob_operator.controller.observed import Refusal, Unplaced
from pipelinejob_operator.controller.plan import Plan
from pipelinejob_operator.policy.facts import SparePod, StagePod
from pipelinejob_operator.policy.reasons import Reason
from pipelinejob_worker.protocol import (
    AgentStatus,
    ExitCode,
    FailureRecord,
    Membership,
    ProtectionStatus,
    RecoveryStatus,
)
from tests.unit.operator import builders
from tests.unit.operator.builders import NOW, decide, ended, kinds, leaving, manifest, message, seconds, told

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


class TestBirth:
    def test_pods_come_as_a_gang_and_the_group_is_written_before_anyone_is_told(self) -> None:
        world = World(job())
        assert created(world.look().actions) == [f"tiny-s{stage}-a0" for stage in range(4)]
        gated = [replace(one, gate=0, scheduled=False, node="", address="", ready=False) for one in gang()]
        world.pods = gated
        assert world.look().actions == tuple(OpenGate(one) for one in gated)
        world.pods = gang(4, pod(3, address="", ready=False))
        assert world.look().status.group is None, "stage 3 has no address yet"
        world.pods = [replace(one, ready=False) for one in gang()]
        made = world.look()
        assert (made.actions, made.status.epoch, made.irreversible) == ((), 1, True)
        assert made.status.group is not None
        assert (made.status.group.stages, made.status.group.master_address) == (4, "10.0.0.0")
        assert kinds(world.look()) == ["SetMembership"] * 4
        middle = world.memberships()["tiny-s1-a0"]
        assert (middle.epoch, middle.action, middle.rank, middle.world_size) == (1, "Run", 1, 4)
        assert (middle.master_address, middle.previous_address, middle.next_address) == (
            "10.0.0.0",
            "10.0.0.0",
            "10.0.0.2",
        )

    def test_a_running_group_needs_nothing_and_its_status_is_stable(self) -> None:
        world = running()
        made = world.look()
        assert (made.actions, made.notices) == ((), ())
        assert made.status.summary.state == "Running"
        assert told(made)["Protected"] == ("Unknown", "NotProtectedYet")

    def test_pods_of_a_refused_gang_are_released(self) -> None:
        no = Refusal(Reason.QUOTA_EXCEEDED, "exceeded quota", 1, NOW + seconds(4))
        gated = [replace(one, gate=0, scheduled=False, node="", address="", ready=False) for one in gang(2)]
        made = World(job(), *gated).look(refusal=no)
        assert deleted(made.actions) == ["tiny-s0-a0", "tiny-s1-a0"]

    def test_each_pod_says_that_its_agent_recovers(self) -> None:
        (first, *_) = [action for action in World(job()).look().actions if isinstance(action, CreatePod)]
        meta, spec = first.manifest["metadata"], first.manifest["spec"]
        assert meta["labels"]["pipelinejob.dev/replacement"] == "0"
        (worker,) = spec["containers"]
        assert worker["restartPolicyRules"] == [
            {
                "action": "RestartAllContainers",
                "exitCodes": {"operator": "NotIn", "values": [0, 64, 70, 75, 79]},
            }
        ]
        assert {"name": "pipelinejob-recovery", "mountPath": "/run/pipelinejob"} in worker["volumeMounts"]
        assert {"name": "pipelinejob-recovery", "emptyDir": {"medium": "Memory"}} in spec["volumes"]


class TestOneStage:
    """A pod is lost; the others stay as they are."""

    def test_the_failure_is_written_down_then_a_new_pod_is_made_for_that_stage_alone(self) -> None:
        world = running()
        world.lose("tiny-s1-a0")
        made = world.look()
        assert (made.actions, made.irreversible) == ((), True), "the intent comes first"
        status = made.status
        assert (status.attempt, status.restarts, status.restart_times) == (0, 1, ["2026-01-01T12:00:00Z"])
        assert [(item.restarts, item.replacement) for item in status.stages] == [(0, 0), (1, 1), (0, 0), (0, 0)]
        assert status.first_failure is not None
        assert (status.first_failure.stage, status.first_failure.reason) == (1, "PodLost")
        assert told(made)["Running"] == ("False", "Recovering")
        assert status.summary.state == "Recovering"
        assert [(notice.kind, notice.reason) for notice in made.notices] == [("Warning", "Recovering")]
        made = world.look()
        assert created(made.actions) == ["tiny-s1-a0-r1"]
        assert deleted(made.actions) == []
        assert made.status.restarts == 1

    def test_a_pod_that_may_live_on_unseen_is_fenced_by_a_new_epoch(self) -> None:
        world = running()
        world.lose("tiny-s1-a0")
        assert world.look().status.epoch == 2
        world.look()
        assert {name: item.epoch for name, item in world.memberships().items()} == {
            f"tiny-s{stage}-a0": 2 for stage in (0, 2, 3)
        }

    def test_a_pod_that_has_ended_needs_no_new_epoch(self) -> None:
        world = running()
        world.swap(replace(pod(1), **vars(ended(1, 1, replacement=0, shape=FOUR)) | {"membership": ""}))
        assert world.look().status.epoch == 1
        made = world.look()
        assert (created(made.actions), deleted(made.actions)) == (["tiny-s1-a0-r1"], ["tiny-s1-a0"])
        world.lose("tiny-s1-a0")
        world.swap(pod(1, 1, ready=False, address="10.0.0.7"))
        world.settle()
        newcomer = world.memberships()["tiny-s1-a0-r1"]
        assert (newcomer.epoch, newcomer.action, newcomer.rank) == (1, "Run", 1)

    def test_a_pod_that_was_asked_to_leave_hands_over_before_its_successor_takes_the_rank(self) -> None:
        world = running()
        world.swap(leaving(pod(1)))
        made = world.look()
        assert (made.status.restarts, made.status.first_failure) == (0, None)
        assert told(made)["Running"] == ("False", "Moving")
        assert created(world.look().actions) == ["tiny-s1-a0-r1"], "it is made at once, its imports take time"
        world.swap(pod(1, 1, ready=False, address="10.0.0.7"))
        made = world.look()
        assert "tiny-s1-a0-r1" not in world.memberships()
        assert made.look_again_at == NOW + seconds(40)
        world.swap(leaving(ended(1, ExitCode.DRAINED, replacement=0, shape=FOUR)))
        world.look()
        assert world.memberships()["tiny-s1-a0-r1"].epoch == 1

    def test_the_new_address_of_stage_0_is_a_new_epoch_for_all(self) -> None:
        world = running()
        world.lose("tiny-s0-a0")
        world.settle()
        world.swap(pod(0, 1, ready=False, address=""))
        assert world.look().status.epoch == 2, "of the fence"
        world.swap(pod(0, 1, ready=False, address="10.0.0.7"))
        made = world.look()
        assert made.status.epoch == 3
        world.look()
        assert {item.master_address for item in world.memberships().values()} == {"10.0.0.7"}
        assert len(world.memberships()) == 4

    def test_a_sandbox_that_comes_back_with_another_address_keeps_its_pod(self) -> None:
        world = running()
        world.swap(pod(0, address="10.0.0.7"))
        assert world.look().status.epoch == 2
        assert kinds(world.look()) == ["SetMembership"] * 4

    def test_two_pods_of_one_stage_are_safe_the_newest_counts(self) -> None:
        world = running()
        world.pods.append(pod(1, 1, ready=False, address="10.0.0.7"))
        made = world.look()
        assert deleted(made.actions) == ["tiny-s1-a0"]
        assert made.status.stages[1].replacement == 1
        assert made.status.restarts == 0

    def test_a_replacement_that_nobody_wrote_down_is_found_again(self) -> None:
        world = running()
        world.lose("tiny-s1-a0")
        before = world.job
        world.look()
        world.look()
        world.job = before  # the operator died before it could write the status, another one made the pod
        world.swap(pod(1, 1, ready=False, address="10.0.0.7"))
        made = world.settle()
        assert made.status.stages[1].replacement == 1
        assert created(world.take()) == ["tiny-s1-a0-r1"]

    def test_a_dead_nodes_pod_is_not_waited_for(self) -> None:
        world = running()
        dead = frozenset({"node-1"})
        world.swap(pod(1, ready=False))
        made = world.look(unready_nodes=dead)
        assert (made.status.restarts, made.status.epoch) == (1, 2)
        made = world.look(unready_nodes=dead)
        assert (created(made.actions), deleted(made.actions)) == (["tiny-s1-a0-r1"], ["tiny-s1-a0"])
        world.swap(leaving(pod(1, ready=False)), pod(1, 1, ready=False, node="node-5", address="10.0.0.7"))
        world.look(unready_nodes=dead)
        assert world.memberships()["tiny-s1-a0-r1"].epoch == 2

    def test_all_pods_at_once_are_all_replaced_and_it_is_one_failure(self) -> None:
        world = running()
        world.pods = []
        made = world.look()
        assert made.status.restarts == 1
        assert created(world.look().actions) == [f"tiny-s{stage}-a0-r1" for stage in range(4)]

    def test_new_pods_in_quick_succession_wait_ever_longer(self) -> None:
        world, waits = running(), []
        for number in range(4):
            world.lose(pod(1, number).name)
            world.look()
            made = world.look()
            waits.append((made.look_again_at - world.now).seconds if made.look_again_at else 0)
            world.now += seconds(waits[-1])
            assert created(world.look().actions) == [pod(1, number + 1).name]
            world.swap(pod(1, number + 1))
            world.settle()
        assert waits == [0, 1, 2, 4]

    def test_a_spent_budget_fails_the_job_and_names_the_first_failure(self) -> None:
        world = running(job(recovery={"maxRestarts": 0}))
        world.swap(ended(1, 137, reason="OOMKilled", replacement=0, shape=FOUR))
        made = world.look()
        assert told(made)["Succeeded"] == ("False", "RestartBudgetSpent")
        assert "stage 1" in message(made, "Succeeded")
        assert "0 restarts within 3600 s are spent" in message(made, "Succeeded")

    def test_an_agent_that_has_given_up_fails_the_job(self) -> None:
        world = running()
        world.swap(ended(2, ExitCode.BUDGET_SPENT, message="5 times in a row", replacement=0, shape=FOUR))
        made = world.look()
        assert told(made)["Succeeded"] == ("False", "RestartBudgetSpent")
        assert "5 times in a row" in message(made, "Succeeded")

    def test_a_refused_replacement_keeps_the_others_and_is_asked_for_again(self) -> None:
        world = running()
        world.lose("tiny-s1-a0")
        world.look()
        no = Refusal(Reason.QUOTA_EXCEEDED, "exceeded quota", 1, NOW + seconds(4))
        made = world.look(refusal=no)
        assert (created(made.actions), deleted(made.actions)) == ([], [])
        assert told(made)["Placed"] == ("False", "QuotaExceeded")
        assert made.look_again_at == NOW + seconds(4)

    def test_a_gang_that_has_partly_ended_starts_anew_as_a_whole(self) -> None:
        world = running()
        world.swap(ended(0, 0, replacement=0, shape=FOUR))
        world.lose("tiny-s1-a0")
        made = world.look()
        assert (made.status.attempt, made.status.group, made.status.restarts) == (1, None, 1)
        assert [item.replacement for item in made.status.stages] == [0] * 4

    def test_a_node_that_fails_again_and_again_is_avoided(self) -> None:
        world = running()
        for number in range(2):
            dead = replace(pod(1, number), node="node-1")
            world.swap(replace(dead, phase="Failed", reason="Evicted", ready=False))
            world.look()
            world.lose(dead.name)
            world.now += seconds(100)
            made = world.look()
            world.swap(replace(pod(1, number + 1), node="node-1"))
            world.settle()
        assert [(item.name, item.failures) for item in made.status.avoided_nodes] == [("node-1", 2)]
        (last,) = [action for action in made.actions if isinstance(action, CreatePod)]
        required = last.manifest["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert required["nodeSelectorTerms"] == [
            {"matchFields": [{"key": "metadata.name", "operator": "NotIn", "values": ["node-1"]}]}
        ]


class TestAgentsAlone:
    """What the agents and the kubelet answer is counted and told, and nothing else is done."""

    RECORD = FailureRecord(rank=2, at=NOW.timestamp(), exit_code=139, reason="Signal", node="node-2", epoch=1, step=7)

    def test_a_workers_end_is_counted_once(self) -> None:
        world = running()
        made = world.look(agent=agent(failures=(self.RECORD,)))
        assert made.actions == ()
        assert (made.status.restarts, made.status.attempt, made.status.epoch) == (1, 0, 1)
        assert [item.restarts for item in made.status.stages] == [0, 0, 1, 0]
        assert made.status.first_failure is not None
        assert (made.status.first_failure.stage, made.status.first_failure.exit_code) == (2, 139)
        assert [(notice.kind, notice.reason) for notice in made.notices] == [("Warning", "Recovering")]
        assert "stage 2 (pod tiny-s2-a0) on node node-2 failed with exit code 139" in made.notices[0].message
        again = world.look(agent=agent(failures=(self.RECORD,)))
        assert (again.status, again.notices) == (made.status, ())

    def test_two_workers_at_once_are_one_failure_of_two_stages(self) -> None:
        other = self.RECORD.model_copy(update={"rank": 1})
        made = running().look(agent=agent(failures=(self.RECORD, other)))
        assert made.status.restarts == 1
        assert [item.restarts for item in made.status.stages] == [0, 1, 1, 0]

    def test_a_container_that_was_started_again_is_counted_once_and_its_record_explains_it(self) -> None:
        world = running()
        world.swap(pod(2, container_restarts=1, ready=False))
        made = world.look()
        assert (made.status.restarts, made.status.stages[2].container_restarts) == (1, 1)
        assert told(made)["Running"][0] == "False"
        oom = self.RECORD.model_copy(update={"reason": "OOMKilled", "exit_code": 137})
        made = world.look(agent=agent(failures=(oom,)))
        assert made.status.restarts == 1
        assert made.status.first_failure is not None
        assert made.status.first_failure.reason == "OOMKilled"
        assert world.look(agent=agent(failures=(oom,))).status == made.status

    def test_while_the_kubelet_starts_it_again_nothing_is_replaced(self) -> None:
        world = running()
        world.swap(ended(2, 137, replacement=0, shape=FOUR, restarting=True, phase="Running"))
        made = world.look()
        assert (made.actions, made.status.restarts) == ((), 0)

    def test_too_many_failures_of_any_rung_end_the_job(self) -> None:
        world = running(job(recovery={"maxRestarts": 1}))
        world.look(agent=agent(failures=(self.RECORD,)))
        world.lose("tiny-s1-a0")
        assert told(world.look())["Succeeded"] == ("False", "RestartBudgetSpent")

    def test_protection_is_shown(self) -> None:
        kept = ProtectionStatus(step=7, guarded_step=6, interval_steps=2, at_risk_steps=3, cost_percent=1.4)
        went = RecoveryStatus(last_pause_seconds=0.44, resumed_step=6, steps_repeated=1)
        made = running().look(agent=agent(protection=kept, recovery=went))
        assert told(made)["Protected"] == ("True", "Protected")
        assert made.status.protection is not None
        assert made.status.protection.model_dump() == {
            "step": 7,
            "guarded_step": 6,
            "interval_steps": 2,
            "at_risk_steps": 3,
            "cost_percent": 1,
        }
        assert made.status.last_recovery is not None
        assert made.status.last_recovery.model_dump() == {
            "pause_milliseconds": 440,
            "resumed_step": 6,
            "repeated_steps": 1,
        }

    def test_what_is_not_protected_is_said_with_what_it_needs(self) -> None:
        words = "snapshots need 8 GiB, spec.recovery.memory allows 4 GiB"
        made = running().look(agent=agent(protection=ProtectionStatus(problem=words)))
        assert told(made)["Protected"] == ("False", "Unprotected")
        assert message(made, "Protected") == words
        assert [notice.kind for notice in made.notices] == ["Warning"]


class TestOldAgents:
    def test_an_agent_that_gives_in_when_it_loses_a_peer_makes_the_gang_restart_as_a_whole(self) -> None:
        world = running()
        world.swap(ended(0, ExitCode.PEER_LOST, replacement=0, shape=FOUR), ended(1, 1, replacement=0, shape=FOUR))
        made = world.look()
        assert (made.status.attempt, made.status.restarts, made.status.group) == (1, 1, None)

    def test_its_image_is_named_as_the_reason(self) -> None:
        made = running().look(agent=agent(protocol_version=3))
        assert told(made)["Protected"] == ("False", "WorkerTooOld")

    def test_pods_of_an_older_operator_restart_as_a_gang(self) -> None:
        old = [replace(one, replacement=None, membership="{}") for one in gang()]
        some = World(job(), *old)
        some.settle()
        some.lose("tiny-s1-a0")
        assert some.look().status.attempt == 1

    def test_the_next_attempt_is_of_the_new_kind_in_an_epoch_above_all_before(self) -> None:
        old = [replace(one, replacement=None, membership="{}") for one in gang()]
        world = World(job(), *old)
        world.settle()
        world.lose("tiny-s1-a0")
        world.look()
        world.pods = []
        world.now += seconds(1)
        assert created(world.settle().actions) == [f"tiny-s{stage}-a1" for stage in range(4)]
        world.pods = [replace(one, attempt=1, name=f"tiny-s{one.place.stage}-a1") for one in gang()]
        assert world.settle().status.epoch == 2

    def test_a_status_that_has_lost_its_group_takes_an_epoch_above_what_the_pods_show(self) -> None:
        world = running()
        world.lose("tiny-s1-a0")
        world.settle()
        world.swap(pod(1, 1))
        world.settle()
        world.job = replace(world.job, status=world.job.status.model_copy(update={"epoch": 0, "group": None}))
        assert world.look().status.epoch == 3
        assert world.look().status.attempt == 0


class TestSpares:
    def test_spares_are_made_when_every_stage_has_its_node(self) -> None:
        some = job(recovery={"spares": 2})
        waits = World(some, *gang(4, pod(3, scheduled=False, node="", ready=False)))
        assert created(waits.look().actions) == []
        world = World(some, *gang())
        world.settle()
        names = created(world.take())
        assert names[:2] == ["tiny-spare-0-a0", "tiny-spare-1-a0"]
        made = decide(world.job, *world.pods, spares=[spare()])
        assert created(made.actions) == ["tiny-spare-1-a0"]

    def test_a_spare_has_no_stage(self) -> None:
        world = World(job(recovery={"spares": 1}), *gang())
        world.settle()
        (made, *_) = [action for action in world.take() if isinstance(action, CreatePod)]
        labels = made.manifest["metadata"]["labels"]
        assert labels[SPARE_LABEL] == "0"
        assert STAGE_LABEL not in labels
        env = {item["name"]: item.get("value") for item in made.manifest["spec"]["containers"][0]["env"]}
        assert env["PIPELINEJOB_SPARE"] == "0"
        assert "RANK" not in env
        assert "schedulingGates" not in made.manifest["spec"]

    def test_a_ready_spare_takes_over_a_lost_stage_in_one_write_and_another_is_made(self) -> None:
        world = running(job(recovery={"spares": 1}), spares=[spare()])
        assert world.job.status.ready_spares == 1
        world.lose("tiny-s1-a0")
        world.look()
        made = world.look()
        (taken,) = [one for one in made.actions if isinstance(one, SetMembership) and one.pod.name == spare().name]
        told = Membership.model_validate_json(taken.value)
        assert (told.action, told.rank, told.epoch) == ("Run", 1, 2)
        assert taken.labels[SPARE_LABEL] is None
        assert (taken.labels[STAGE_LABEL], taken.labels["pipelinejob.dev/replacement"]) == ("1", "1")
        assert created(made.actions) == []
        stage = pod(1, 1, name=spare().name, address="10.0.0.9", membership=taken.value)
        world.spares = []
        world.swap(stage)
        assert created(world.look().actions) == ["tiny-spare-0-a1"], "the first name lives on"
        assert world.look().status.stages[1].pod == "tiny-spare-0-a0"

    def test_it_waits_for_the_word_while_the_pod_before_hands_over(self) -> None:
        world = running(job(recovery={"spares": 1}), spares=[spare()])
        world.swap(leaving(pod(1)))
        world.look()
        (taken, *_) = [one for one in world.look().actions if isinstance(one, SetMembership)]
        assert (taken.pod.name, taken.value) == (spare().name, "")

    @pytest.mark.parametrize(
        "one",
        [
            spare(started=False, ready=False),
            spare(gone_by=NOW),
            spare(node="dead"),
            spare(attempt=7),
        ],
        ids=["not started", "leaves", "on a dead node", "of another attempt"],
    )
    def test_a_spare_that_cannot_is_left_out(self, one: SparePod) -> None:
        world = running(job(recovery={"spares": 1}), spares=[one])
        world.lose("tiny-s1-a0")
        world.look(unready_nodes=frozenset({"dead"}))
        assert "tiny-s1-a0-r1" in created(world.look(unready_nodes=frozenset({"dead"})).actions)

    def test_the_warm_one_is_taken(self) -> None:
        world = running(job(recovery={"spares": 2}), spares=[spare(0, ready=False), spare(1)])
        world.lose("tiny-s1-a0")
        world.look()
        (taken, *_) = [one for one in world.look().actions if isinstance(one, SetMembership)]
        assert taken.pod.name == "tiny-spare-1-a0"

    def test_spares_that_nobody_wants_any_more_go(self) -> None:
        world = running(spares=[spare()])
        assert deleted(world.look().actions) == ["tiny-spare-0-a0"]

    def test_a_spare_that_failed_is_replaced_after_a_while(self) -> None:
        lost = spare(ready=False, phase="Failed", started=False)
        world = running(job(recovery={"spares": 1}), spares=[lost])
        assert deleted(world.look().actions) == []
        world.spares = [replace(lost, ended=ended(0, 1).ended)]
        world.now += seconds(30)
        assert deleted(world.look().actions) == ["tiny-spare-0-a0"]


class TestRescale:
    def test_a_smaller_group_is_told_at_once_and_who_leaves_gives_what_it_holds(self) -> None:
        world = running()
        world.spec(stages=2)
        made = world.look()
        assert (made.actions, made.status.epoch) == ((), 2)
        assert made.status.group is not None
        assert (made.status.group.stages, made.status.group.leavers) == (2, ["tiny-s2-a0", "tiny-s3-a0"])
        made = world.settle()
        told_ = world.memberships()
        assert {name: (item.action, item.rank) for name, item in told_.items()} == {
            "tiny-s0-a0": ("Run", 0),
            "tiny-s1-a0": ("Run", 1),
            "tiny-s2-a0": ("Leave", 2),
            "tiny-s3-a0": ("Leave", 3),
        }
        assert {item.leavers for item in told_.values()} == {2}
        assert told(made)["Running"] == ("True", "Rescaling")
        assert made.status.summary.state == "Rescaling"
        assert deleted(world.take()) == []
        assert len(made.status.stages) == 2
        assert made.status.restarts == 0

    def test_a_pod_goes_when_it_has_given_all_and_the_epoch_stays(self) -> None:
        world = running()
        world.spec(stages=3)
        world.settle()
        made = world.look(released=frozenset({"10.0.0.3"}))
        assert (made.actions, made.status.epoch) == ((), 2)
        assert made.status.group is not None
        assert made.status.group.released == ["tiny-s3-a0"]
        made = world.look(released=frozenset({"10.0.0.3"}))
        assert deleted(made.actions) == ["tiny-s3-a0"]
        world.lose("tiny-s3-a0")
        made = world.settle()
        assert (made.status.epoch, made.status.summary.state) == (2, "Running")
        assert world.memberships()["tiny-s0-a0"].leavers == 1, "it is what the epoch began with"

    def test_a_leaver_that_is_lost_before_is_a_new_epoch_without_it(self) -> None:
        world = running()
        world.spec(stages=3)
        world.settle()
        world.lose("tiny-s3-a0")
        made = world.settle()
        assert made.status.epoch == 3
        assert {item.leavers for item in world.memberships().values()} == {0}

    def test_a_larger_group_trains_on_until_the_new_pods_are_warm(self) -> None:
        world = running()
        world.spec(stages=6, train=manifest()["spec"]["train"] | {"schedule": {"name": "GPipe"}})
        made = world.look()
        assert created(made.actions) == ["tiny-s4-a0", "tiny-s5-a0"]
        assert told(made)["Running"] == ("True", "Rescaling")
        six = Shape(6)
        new = [pod(stage, shape=six, ready=False) for stage in (4, 5)]
        world.swap(*(replace(one, gate=0, scheduled=False) for one in new))
        assert kinds(world.look()).count("OpenGate") == 2
        world.swap(*new)
        made = world.settle()
        assert made.status.epoch == 1
        assert world.memberships()["tiny-s4-a0"].action == "Standby"
        world.swap(*(replace(one, ready=True) for one in new))
        made = world.settle()
        assert (made.status.epoch, made.status.summary.stages) == (2, "6/6")
        assert {(item.action, item.world_size) for item in world.memberships().values()} == {("Run", 6)}

    def test_spares_let_a_group_grow_without_new_pods(self) -> None:
        world = running(job(recovery={"spares": 1}), spares=[spare()])
        world.spec(stages=5, recovery={"strategy": "Ladder", "spares": 1}, train=self.gpipe())
        (taken, *_) = [one for one in world.look().actions if isinstance(one, SetMembership)]
        assert (taken.pod.name, taken.labels[STAGE_LABEL], taken.value) == ("tiny-spare-0-a0", "4", "")

    def gpipe(self) -> dict[str, Any]:
        return {**manifest()["spec"]["train"], "schedule": {"name": "GPipe"}}

    def test_down_and_up_again_takes_free_names(self) -> None:
        world = running()
        world.spec(stages=2)
        world.settle()
        world.settle(released=frozenset({"10.0.0.2", "10.0.0.3"}))
        world.swap(leaving(pod(2)), leaving(pod(3)))
        world.take()
        world.spec(stages=3)
        world.settle()
        assert created(world.take())[-1] == "tiny-s2-a0-r1"

    def test_who_leaves_can_be_called_back(self) -> None:
        world = running()
        world.spec(stages=3)
        world.settle()
        world.spec(stages=4)
        made = world.settle()
        assert made.status.epoch == 3
        assert {(item.action, item.world_size) for item in world.memberships().values()} == {("Run", 4)}
        assert deleted(world.take()) == []

    def test_pipelines_come_and_go_as_well(self) -> None:
        two = Shape(2, 2)
        pods = [pod(place.stage, pipeline=place.pipeline, shape=two) for place in two.places()]
        pods = [replace(one, address=f"10.0.1.{index}") for index, one in enumerate(pods)]
        world = running(job(stages=2, pipelines=2), *pods)
        world.spec(stages=2, pipelines=1)
        made = world.settle()
        assert made.status.group is not None
        assert made.status.group.leavers == ["tiny-p1-s0-a0", "tiny-p1-s1-a0"]
        assert world.memberships()["tiny-p1-s1-a0"].rank == 3

    def test_what_the_model_cannot_do_is_refused_and_the_job_runs_on(self) -> None:
        world = running()
        world.spec(stages=11, train=self.gpipe())
        made = world.settle()
        assert told(made)["Accepted"] == ("False", "TooFewLayers")
        assert message(made, "Accepted").endswith("; the job runs on with 4 stages")
        assert (made.status.epoch, made.status.attempt, made.status.summary.state) == (1, 0, "Running")
        assert (created(world.take()), len(made.status.stages)) == ([], 4)
        world.lose("tiny-s1-a0")
        assert world.look().status.summary.state == "Recovering", "it is looked after all the same"

    def test_a_pod_that_only_waits_to_join_makes_room_for_a_stage_that_is_missed(self) -> None:
        world = running()
        world.spec(stages=5, train=self.gpipe())
        world.swap(pod(4, shape=Shape(5), scheduled=False, node="", ready=False, unschedulable="no room"))
        world.settle()
        world.take()
        world.lose("tiny-s1-a0")
        world.look()
        made = world.look()
        assert deleted(made.actions) == ["tiny-s4-a0"]
        assert created(made.actions) == ["tiny-s1-a0-r1"]


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


class TestElasticity:
    """There is no room for all stages."""

    def lacking(self, **elasticity: int) -> World:
        """Stage 1 has lost its node, and its new pod finds no other."""
        world = running(job(elasticity=elasticity))
        world.lose("tiny-s1-a0")
        world.settle()
        world.swap(stuck(1, 1))
        world.settle()
        world.take()
        return world

    def test_without_bounds_it_waits(self) -> None:
        world = self.lacking()
        world.now += seconds(3600)
        made = world.settle()
        assert (made.status.group and made.status.group.stages) == 4
        assert told(made)["Placed"] == ("False", "Unschedulable")

    def test_after_a_while_the_others_go_on_and_one_of_them_takes_the_empty_place(self) -> None:
        world = self.lacking(minStages=2, shrinkAfterSeconds=30)
        assert world.look().look_again_at == NOW + seconds(30)
        epoch = world.job.status.epoch
        world.now += seconds(30)
        made = world.look()
        assert (made.actions, made.status.epoch) == ((), epoch + 1)
        assert made.status.group is not None
        assert [move.model_dump() for move in made.status.group.moves] == [
            {"pod": "tiny-s3-a0", "stage": 1, "pipeline": 0, "replacement": 2}
        ]
        made = world.look()
        ranks = {name: (item.action, item.rank, item.world_size) for name, item in world.memberships().items()}
        assert ranks.pop("tiny-s1-a0-r1") == ("Run", 1, 4), "it will never hear of more: it goes"
        assert ranks == {
            "tiny-s0-a0": ("Run", 0, 3),
            "tiny-s3-a0": ("Run", 1, 3),
            "tiny-s2-a0": ("Run", 2, 3),
        }
        assert deleted(made.actions) == ["tiny-s1-a0-r1"]
        assert created(made.actions) == ["tiny-s3-a0-r1"], "it waits for room"
        assert made.status.restarts == 1, "the loss of the node, and nothing since"

    def test_that_no_plan_fits_counts_like_a_schedulers_no(self) -> None:
        """The new pod waits behind its gate, so kube-scheduler never hears of it."""
        world = running(job(elasticity={"minStages": 2, "shrinkAfterSeconds": 30}))
        world.lose("tiny-s1-a0")
        world.settle()
        world.swap(replace(stuck(1, 1), gate=0, unschedulable=""))
        waits = Unplaced(Reason.NO_PLAN, "0 of 1 stages fit", NOW + seconds(300), 1)
        world.settle(plans=True, unplaced=waits)
        world.now += seconds(30)
        assert world.look(plans=True).status.group == world.job.status.group, "it may find a node at any moment"
        made = world.look(plans=True, unplaced=waits)
        assert (made.status.group and made.status.group.stages) == 3

    def test_it_says_so_and_grows_back_when_there_is_room(self) -> None:
        world = self.lacking(minStages=2, shrinkAfterSeconds=30)
        world.now += seconds(30)
        world.look()
        world.look()
        world.lose("tiny-s1-a0-r1", "tiny-s3-a0")
        moved = replace(pod(1, 2), name="tiny-s3-a0", address="10.0.0.3", membership=world_text(world, 1))
        world.pods = [*world.pods, moved, stuck(3, 1, since=world.now)]
        made = world.settle()
        assert told(made)["Running"] == ("True", "FewerStages")
        assert (made.status.summary.state, made.status.summary.stages) == ("Running", "3/4")
        assert "3 stages run where 4 stages are wanted" in message(made, "Running")
        world.swap(pod(3, 1, address="10.0.0.7"))
        made = world.settle()
        assert (made.status.summary.state, made.status.summary.stages) == ("Running", "4/4")
        assert made.status.restarts == 1


def world_text(world: World, rank: int) -> str:
    """The membership that the group has for a rank."""
    group = world.job.status.group
    assert group is not None
    place = Place(rank, 0, shape_of(group))
    return member(world.job.status.epoch, group, place, {}).to_json()


class TestSuspend:
    def test_the_stages_stop_together_with_a_checkpoint_before_their_pods_go(self) -> None:
        world = running(job(checkpoint={"volumeClaimName": "saves"}))
        world.spec(suspend=True, checkpoint={"volumeClaimName": "saves"})
        made = world.look()
        assert (made.actions, made.status.attempt, made.status.epoch) == ((), 0, 2)
        world.look()
        assert {item.action for item in world.memberships().values()} == {"Stop"}
        made = world.look()
        assert (deleted(made.actions), made.status.summary.state) == ([], "Stopping")
        world.pods = [ended(stage, ExitCode.DRAINED, replacement=0, shape=FOUR) for stage in range(4)]
        assert world.look().status.attempt == 1
        assert len(deleted(world.look().actions)) == 4
        world.pods = []
        made = world.look()
        assert told(made)["Suspended"] == ("True", "Suspended")
        assert made.status.restarts == 0

    def test_stages_that_do_not_stop_are_not_waited_for_for_ever(self) -> None:
        world = running()
        world.spec(suspend=True)
        world.settle()
        world.now += seconds(30)
        assert world.look().status.attempt == 1

    def test_without_a_volume_it_says_that_nothing_is_saved(self) -> None:
        world = running()
        world.spec(suspend=True)
        assert "without spec.checkpoint.volumeClaimName nothing is saved" in message(world.look(), "Suspended")

    def test_a_resume_in_between_starts_the_gang_anew(self) -> None:
        world = running()
        world.spec(suspend=True)
        world.settle()
        world.spec(suspend=False)
        assert world.look().status.attempt == 1

    def test_spares_go_as_well(self) -> None:
        world = running(job(recovery={"spares": 1}), spares=[spare()])
        world.spec(suspend=True, recovery={"strategy": "Ladder", "spares": 1})
        world.settle()
        world.now += seconds(30)
        world.look()
        assert "tiny-spare-0-a0" in deleted(world.look().actions)


class TestEnd:
    def test_a_smaller_group_that_is_done_is_the_jobs_success(self) -> None:
        world = running()
        world.spec(stages=3)
        world.settle()
        world.settle(released=frozenset({"10.0.0.3"}))
        world.pods = [replace(ended(stage, 0, replacement=0, shape=FOUR)) for stage in range(3)]
        made = world.look()
        assert told(made)["Succeeded"] == ("True", "AllStagesSucceeded")

    def test_spares_of_a_finished_job_go(self) -> None:
        world = running(job(recovery={"spares": 1}), spares=[spare()])
        world.pods = [replace(ended(stage, 0, replacement=0, shape=FOUR)) for stage in range(4)]
        world.look()
        assert deleted(world.look().actions) == ["tiny-spare-0-a0"]
