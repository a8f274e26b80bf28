"""Spares, suspending and the end of a job whose agents recover by themselves, told as a story."""

from dataclasses import replace

import pytest

from pipelinejob_operator.build.names import SPARE_LABEL, STAGE_LABEL
from pipelinejob_operator.controller.actions import CreatePod, SetMembership
from pipelinejob_operator.policy.facts import SparePod
from pipelinejob_worker.protocol import (
    ExitCode,
    Membership,
)
from tests.unit.operator.builders import NOW, decide, ended, leaving, message, seconds, told
from tests.unit.operator.world import FOUR, World, created, deleted, gang, job, pod, running, spare


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
