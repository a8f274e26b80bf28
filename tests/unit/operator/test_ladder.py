"""What the operator does about a stage that fails where the agents recover by themselves, told as a story."""

from dataclasses import replace

from pipelinejob_operator.controller.actions import CreatePod, OpenGate
from pipelinejob_operator.controller.observed import Refusal
from pipelinejob_operator.policy.reasons import Reason
from pipelinejob_worker.protocol import (
    ExitCode,
    FailureRecord,
    ProtectionStatus,
    RecoveryStatus,
)
from tests.unit.operator.builders import NOW, ended, kinds, leaving, message, seconds, told
from tests.unit.operator.world import FOUR, World, agent, created, deleted, gang, job, pod, running


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

    def test_what_failed_before_is_what_it_failed_of(self) -> None:
        world = running()
        record = TestAgentsAlone.RECORD
        world.look(agent=agent(failures=(record,)))
        world.swap(ended(2, ExitCode.BUDGET_SPENT, message="5 times in a row", replacement=0, shape=FOUR))
        made = world.look()
        assert made.status.first_failure is not None
        assert made.status.first_failure.exit_code == 139
        assert "failed with exit code 139 (Signal)" in message(made, "Succeeded")
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
        rules = last.manifest["spec"]["affinity"]["nodeAffinity"]
        elsewhere = {"matchFields": [{"key": "metadata.name", "operator": "NotIn", "values": ["node-1"]}]}
        assert rules == {
            "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "preference": elsewhere}]
        }, "where no other node is free, it is better than none"

    def test_an_avoided_node_is_tried_again_when_the_window_is_over(self) -> None:
        world = running(job(recovery={"windowSeconds": 60}))
        world.swap(replace(pod(1), phase="Failed", reason="Evicted", ready=False))
        assert len(world.look().status.avoided_nodes) == 1
        world.now += seconds(60)
        assert world.look().status.avoided_nodes == []


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
