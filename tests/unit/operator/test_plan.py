"""What the operator does about a job, told as a story: from its creation to its end."""

from datetime import timedelta

import pytest

from pipelinejob_operator.api.status import Status
from pipelinejob_operator.build.job import Job
from pipelinejob_operator.controller.actions import (
    CreatePod,
    DeleteJob,
    DeletePod,
    OpenGate,
    SetMembership,
)
from pipelinejob_operator.controller.observed import Refusal
from pipelinejob_operator.policy.facts import Claim, Waiting
from pipelinejob_operator.policy.reasons import Reason
from pipelinejob_worker.protocol import ExitCode, Membership, Progress, StageTiming
from tests.unit.operator.builders import (
    NOW,
    decide,
    ended,
    gated,
    job,
    kinds,
    leaving,
    manifest,
    message,
    pod,
    running_job,
    seconds,
    settled,
    told,
)


class TestBirth:
    def test_a_new_job_gets_its_network_first_and_one_gated_pod_a_stage(self) -> None:
        made = decide(job())
        assert kinds(made) == ["ApplyObject", "ApplyObject", "CreatePod", "CreatePod", "CreatePod"]
        created = [action.manifest for action in made.actions if isinstance(action, CreatePod)]
        assert [item["metadata"]["name"] for item in created] == ["tiny-s0-a0", "tiny-s1-a0", "tiny-s2-a0"]
        assert all(item["spec"]["schedulingGates"] == [{"name": "pipelinejob.dev/gang"}] for item in created)
        assert not made.irreversible

    def test_all_conditions_are_there_from_the_first_visit(self) -> None:
        assert told(decide(job())) == {
            "Accepted": ("True", "Valid"),
            "Placed": ("False", "Creating"),
            "Running": ("False", "NotPlaced"),
            "Suspended": ("False", "NotSuspended"),
            "Succeeded": ("Unknown", "Active"),
        }

    def test_only_what_is_missing_is_created(self) -> None:
        created = [a.manifest for a in decide(job(), gated(0), gated(2)).actions if isinstance(a, CreatePod)]
        assert [item["metadata"]["name"] for item in created] == ["tiny-s1-a0"]

    def test_no_gate_opens_before_all_pods_exist_and_then_all_do(self) -> None:
        assert OpenGate not in map(type, decide(job(), gated(0), gated(1)).actions)
        assert decide(job(), gated(0), gated(1), gated(2)).actions == tuple(
            OpenGate(gated(stage)) for stage in range(3)
        )

    def test_an_operator_that_died_while_it_opened_gates_opens_the_rest(self) -> None:
        made = decide(job(), pod(0, ready=False), gated(1), gated(2))
        assert made.actions == (OpenGate(gated(1)), OpenGate(gated(2)))

    def test_memberships_are_written_when_every_pod_has_an_address(self) -> None:
        fresh = [pod(stage, membership="", ready=False) for stage in range(3)]
        assert decide(job(), fresh[0], fresh[1], pod(2, address="", ready=False)).actions == ()
        made = decide(job(), *fresh)
        assert kinds(made) == ["SetMembership"] * 3
        middle = made.actions[1]
        assert isinstance(middle, SetMembership)
        assert Membership.model_validate_json(middle.value) == Membership(
            epoch=1,
            action="Run",
            stage=1,
            stages=3,
            master_address="10.0.0.0",
            master_port=29500,
            previous_address="10.0.0.0",
            next_address="10.0.0.2",
        )

    def test_a_running_gang_needs_nothing_and_its_status_is_stable(self) -> None:
        running = running_job()
        made = decide(running, pod(0), pod(1), pod(2), now=NOW + seconds(100))
        assert (made.actions, made.notices, made.status) == ((), (), running.status)
        assert made.status.summary.state == "Running"

    def test_service_and_policy_are_looked_at_now_and_then(self) -> None:
        made = decide(running_job(), pod(0), pod(1), pod(2), network_due=True)
        assert kinds(made) == ["ApplyObject", "ApplyObject"]

    def test_a_job_that_is_being_deleted_is_left_to_the_garbage_collector(self) -> None:
        deleted = Job.read(manifest(meta={"deletionTimestamp": "2026-01-01T12:00:00Z"}))
        assert decide(deleted, pod(0)).actions == ()


class TestPlacement:
    def test_a_stage_that_finds_no_node_is_told_in_the_schedulers_words(self) -> None:
        stuck = pod(1, scheduled=False, node="", unschedulable="0/4 nodes are available", ready=False)
        made = decide(job(), pod(0), stuck, pod(2))
        assert told(made)["Placed"] == ("False", "Unschedulable")
        assert message(made, "Placed") == "1 of 3 stages find no node; stage 1: 0/4 nodes are available"

    def test_with_a_claim_for_one_node_the_message_says_what_that_means(self) -> None:
        stuck = pod(1, scheduled=False, node="", unschedulable="no room", ready=False)
        claim = Claim("saves", frozenset({"ReadWriteOnce"}))
        made = decide(job(checkpoint={"volumeClaimName": "saves"}), pod(0), stuck, pod(2), claim=claim)
        assert 'claim "saves" is ReadWriteOnce, so all 3 stages must share one node' in message(made, "Placed")

    def test_a_missing_claim_makes_no_pods_and_is_looked_for_again(self) -> None:
        some = job(checkpoint={"volumeClaimName": "saves"})
        made = decide(some, claim_missing=True)
        assert made.actions == ()
        assert told(made)["Placed"] == ("False", "VolumeClaimNotFound")
        assert made.look_again_at == NOW + seconds(2)

    @pytest.mark.parametrize(("waited", "wait"), [(0, 2), (5, 5), (30, 30), (3600, 60)])
    def test_the_longer_the_claim_is_missing_the_rarer_it_is_looked_for(self, waited: int, wait: int) -> None:
        some = settled(job(checkpoint={"volumeClaimName": "saves"}), claim_missing=True)
        now = NOW + seconds(waited)
        assert decide(some, claim_missing=True, now=now).look_again_at == now + seconds(wait)

    def test_a_refusal_releases_the_pods_that_were_created_and_waits(self) -> None:
        no = Refusal(Reason.QUOTA_EXCEEDED, "exceeded quota", 1, NOW + seconds(4))
        made = decide(job(), gated(0), gated(1), refusal=no)
        assert made.actions == (DeletePod(gated(0)), DeletePod(gated(1)))
        assert told(made)["Placed"] == ("False", "QuotaExceeded")
        assert made.look_again_at == NOW + seconds(4)
        assert made.irreversible

    def test_an_image_that_cannot_be_pulled_is_named(self) -> None:
        waiting = Waiting("ErrImagePull", "not found", "worker:typo")
        made = decide(job(), pod(0), pod(1), pod(2, ready=False, phase="Pending", waiting=waiting))
        assert told(made)["Running"] == ("False", "ImagePullFailed")
        assert "stage 2 on node node-2 cannot pull image worker:typo" in message(made, "Running")

    def test_a_container_that_cannot_be_made_is_named(self) -> None:
        waiting = Waiting("CreateContainerConfigError", 'secret "token" not found', "worker:1")
        made = decide(job(), pod(0, ready=False, phase="Pending", waiting=waiting), pod(1), pod(2))
        assert told(made)["Running"] == ("False", "ContainerConfigError")
        assert 'secret "token" not found' in message(made, "Running")


class TestFailure:
    def test_the_intent_is_written_before_anything_is_deleted(self) -> None:
        made = decide(running_job(), ended(0, ExitCode.PEER_LOST), ended(1, 1, step=7), pod(2))
        assert made.actions == ()
        assert (made.status.attempt, made.status.restarts, made.status.consecutive_restarts) == (1, 1, 1)
        assert made.status.restart_times == ["2026-01-01T12:00:00Z"]
        assert made.status.first_failure is not None
        assert (made.status.first_failure.stage, made.status.first_failure.node) == (1, "node-1")
        assert [stage.restarts for stage in made.status.stages] == [0, 1, 0]
        assert made.status.summary.state == "Restarting"
        assert made.irreversible

    def test_then_the_pods_of_the_last_attempt_go_and_the_next_gang_waits_for_them(self) -> None:
        failed = settled(running_job(), pod(0), ended(1, 1), pod(2))
        made = decide(failed, pod(0), ended(1, 1), pod(2))
        assert made.actions == (DeletePod(pod(0)), DeletePod(ended(1, 1)), DeletePod(pod(2)))
        made = decide(failed, leaving(pod(0)), now=NOW + seconds(5))
        assert made.actions == ()
        assert made.look_again_at == NOW + seconds(40), "grace period and ten seconds"

    def test_a_pod_that_outstays_its_grace_period_is_not_waited_for(self) -> None:
        failed = settled(running_job(), pod(0), ended(1, 1), pod(2))
        made = decide(failed, leaving(pod(0)), now=NOW + seconds(40))
        assert kinds(made).count("CreatePod") == 3

    def test_nor_is_a_pod_on_a_dead_node(self) -> None:
        failed = settled(running_job(), pod(0), ended(1, 1), pod(2))
        made = decide(failed, leaving(pod(0)), now=NOW + seconds(5), unready_nodes=frozenset({"node-0"}))
        assert kinds(made).count("CreatePod") == 3

    def test_the_next_gang_comes_after_the_back_off(self) -> None:
        failed = settled(running_job(), pod(0), ended(1, 1), pod(2))
        made = decide(failed, now=NOW + seconds(0.5))
        assert (made.actions, made.look_again_at) == ((), NOW + seconds(1))
        made = decide(failed, now=NOW + seconds(1))
        created = [action.manifest for action in made.actions if isinstance(action, CreatePod)]
        assert [item["metadata"]["name"] for item in created] == ["tiny-s0-a1", "tiny-s1-a1", "tiny-s2-a1"]

    def test_restarts_without_progress_wait_ever_longer(self) -> None:
        state, waits = running_job(), []
        for attempt in range(8):
            pods = [pod(0, attempt), ended(1, 1, attempt, step=5), pod(2, attempt)]
            state = settled(state, pod(0, attempt), pod(1, attempt), pod(2, attempt))
            state = settled(state, *pods)
            due = decide(state).look_again_at
            assert due is not None
            waits.append((due - NOW).seconds)
        assert waits == [1, 2, 4, 8, 16, 32, 60, 60]

    def test_a_step_past_the_last_failure_starts_the_back_off_anew(self) -> None:
        state = running_job()
        for attempt, step in enumerate((5, 5, 6)):
            state = settled(state, pod(0, attempt), pod(1, attempt), pod(2, attempt))
            state = settled(state, pod(0, attempt), ended(1, 1, attempt, step=step), pod(2, attempt))
        assert state.status.consecutive_restarts == 1

    def test_a_spent_budget_fails_the_job_and_names_the_first_failure(self) -> None:
        some = running_job(recovery={"maxRestarts": 0})
        made = decide(some, pod(0), ended(1, 137, reason="OOMKilled", log_tail=("allocating",)), pod(2))
        assert told(made)["Succeeded"] == ("False", "RestartBudgetSpent")
        for word in ("stage 1", "node node-1", "exit code 137", "OOMKilled", "allocating"):
            assert word in message(made, "Succeeded")
        assert made.status.summary.state == "Failed"
        assert made.status.completion_time == "2026-01-01T12:00:00Z"

    def test_an_unfit_configuration_fails_the_job_at_once(self) -> None:
        end = ended(2, ExitCode.CONFIGURATION, message="no file matches /data/*")
        made = decide(running_job(), pod(0), pod(1), end)
        assert told(made)["Succeeded"] == ("False", "InvalidConfiguration")
        assert "no file matches /data/*" in message(made, "Succeeded")

    def test_with_a_command_of_the_users_own_exit_codes_have_no_such_meaning(self) -> None:
        template = {"spec": {"containers": [{"name": "worker", "command": ["torchrun"]}]}}
        made = decide(running_job(template=template), pod(0), pod(1), ended(2, ExitCode.CONFIGURATION))
        assert made.status.restarts == 1

    def test_a_drained_gang_moves_on_and_it_counts_as_no_failure(self) -> None:
        drained = [ended(stage, ExitCode.DRAINED) for stage in range(3)]
        made = decide(running_job(), *drained)
        assert (made.status.attempt, made.status.restarts, made.status.first_failure) == (1, 0, None)
        assert told(made)["Running"] == ("False", "Replacing")

    def test_pods_that_are_gone_altogether_are_lost_not_unborn(self) -> None:
        made = decide(running_job())
        assert (made.status.attempt, made.status.restarts) == (1, 1)
        assert made.status.first_failure is not None
        assert made.status.first_failure.reason == "PodLost"

    def test_an_event_tells_each_restart_once(self) -> None:
        made = decide(running_job(), pod(0), ended(1, 1), pod(2))
        assert [(notice.kind, notice.reason) for notice in made.notices] == [("Warning", "Restarting")]


class TestSwitches:
    def test_suspend_retires_the_gang_and_then_deletes_it(self) -> None:
        some = Job.read(manifest(running_job().status, suspend=True))
        made = decide(some, pod(0), pod(1), pod(2))
        assert (made.actions, made.status.attempt, made.status.start_time) == ((), 1, None)
        assert told(made)["Suspended"] == ("False", "Stopping")
        assert made.status.summary.state == "Stopping"
        retired = settled(some, pod(0), pod(1), pod(2))
        made = decide(retired, pod(0), pod(1), leaving(pod(2)))
        assert made.actions == (DeletePod(pod(0)), DeletePod(pod(1)))

    def test_a_job_is_suspended_when_no_pod_is_left(self) -> None:
        made = decide(job(suspend=True))
        assert told(made)["Suspended"] == ("True", "Suspended")
        assert made.status.summary.state == "Suspended"
        assert made.actions == ()

    def test_a_resumed_job_starts_its_clock_anew(self) -> None:
        suspended = settled(job(suspend=True))
        resumed = Job.read(manifest(suspended.status))
        later = NOW + seconds(3600)
        made = decide(resumed, now=later)
        assert made.status.start_time == "2026-01-01T13:00:00Z"
        assert kinds(made).count("CreatePod") == 3

    def test_the_deadline_fails_the_job(self) -> None:
        some = running_job(activeDeadlineSeconds=60)
        assert decide(some, pod(0), pod(1), pod(2)).look_again_at == NOW + seconds(60)
        made = decide(some, pod(0), pod(1), pod(2), now=NOW + seconds(60))
        assert told(made)["Succeeded"] == ("False", "DeadlineExceeded")

    def test_a_job_that_succeeds_at_its_deadline_has_succeeded(self) -> None:
        some = running_job(activeDeadlineSeconds=60)
        made = decide(some, *(ended(stage, 0) for stage in range(3)), now=NOW + seconds(60))
        assert told(made)["Succeeded"] == ("True", "AllStagesSucceeded")

    def test_another_number_of_stages_replaces_the_gang_and_it_counts_as_no_failure(self) -> None:
        grown = Job.read(manifest(running_job().status, stages=4))
        made = decide(grown, pod(0), pod(1), pod(2))
        assert (made.status.attempt, made.status.restarts) == (1, 0)
        assert told(made)["Running"] == ("False", "Replacing")
        assert made.status.summary.stages == "3/4"

    def test_nothing_runs_under_a_spec_that_is_not_accepted(self) -> None:
        train = manifest()["spec"]["train"] | {"schedule": {"name": "GPipe"}}
        grown = Job.read(manifest(running_job().status, stages=11, train=train))
        made = decide(grown, pod(0), pod(1), pod(2))
        assert told(made)["Accepted"] == ("False", "TooFewLayers")
        assert made.status.attempt == 1
        assert made.status.summary.state == "Refused"
        refused = settled(grown, pod(0), pod(1), pod(2))
        assert kinds(decide(refused, pod(0), pod(1), pod(2))) == ["DeletePod"] * 3


class TestEnd:
    def finished(self, **spec: object) -> Job:
        return settled(running_job(**spec), *(ended(stage, 0) for stage in range(3)))

    def test_a_job_succeeds_when_every_stage_has(self) -> None:
        made = decide(running_job(), ended(0, 0), ended(1, 0), pod(2))
        assert told(made)["Succeeded"] == ("Unknown", "Active")
        done = self.finished()
        assert done.status.summary.state == "Succeeded"
        assert done.status.summary.stages == "3/3"
        assert done.status.completion_time == "2026-01-01T12:00:00Z"

    def test_the_last_step_comes_from_the_stages_own_words(self) -> None:
        made = decide(running_job(), *(ended(stage, 0, step=200) for stage in range(3)))
        assert (made.status.summary.step, made.status.summary.progress) == ("200/200", "100%")

    def test_the_whole_progress_comes_from_the_stages_own_words(self) -> None:
        told = Progress(
            step=200,
            total_steps=200,
            loss=1.25,
            tokens_per_second=90,
            last_checkpoint_step=150,
            stages=(StageTiming(stage=1, busy_percent=70, layers="3-4"),),
        )
        ends = [ended(stage, 0, step=200, progress=told) for stage in range(3)]
        status = decide(running_job(checkpoint={"volumeClaimName": "saves"}), *ends).status
        assert (status.summary.loss, status.summary.tokens_per_second) == ("1.25", "90")
        assert status.progress.last_checkpoint_step == 150, "the agent knows what was saved; nothing is concluded"
        assert (status.stages[1].layers, status.stages[1].busy_percent) == ("3-4", 70)

    def test_a_finished_job_is_final(self) -> None:
        done = self.finished()
        made = decide(done, now=NOW + seconds(1000))
        assert (made.actions, made.status) == ((), done.status)

    @pytest.mark.parametrize(("policy", "deleted"), [("Running", [2]), ("All", [0, 1, 2]), ("None", [])])
    def test_the_cleanup_policy_says_which_pods_go(self, policy: str, deleted: list[int]) -> None:
        some = running_job(activeDeadlineSeconds=60, podCleanupPolicy=policy)
        late = NOW + seconds(60)
        pods = [ended(0, 0), ended(1, 0), pod(2)]
        failed = settled(some, *pods, now=late)
        made = decide(failed, *pods, now=late)
        assert [action.pod.place.stage for action in made.actions if isinstance(action, DeletePod)] == deleted

    def test_a_finished_job_is_deleted_when_its_time_to_live_is_over(self) -> None:
        done = self.finished(ttlSecondsAfterFinished=100)
        made = decide(done, now=NOW + seconds(99))
        assert (made.actions, made.look_again_at) == ((), NOW + seconds(100))
        assert decide(done, now=NOW + timedelta(seconds=100)).actions == (DeleteJob(),)


def test_a_transition_time_moves_only_with_the_status() -> None:
    first = decide(job(), gated(0), gated(1), gated(2))
    later = decide(settled(job(), gated(0), gated(1), gated(2)), pod(0), pod(1), pod(2), now=NOW + seconds(9))
    times = {item.type: item.last_transition_time for item in later.status.conditions}
    assert times["Accepted"] == "2026-01-01T12:00:00Z"
    assert times["Running"] == "2026-01-01T12:00:09Z"
    assert first.status != Status()
