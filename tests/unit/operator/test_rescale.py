"""A job whose agents recover by themselves gets another number of stages, told as a story."""

from dataclasses import replace
from typing import Any

from pipelinejob_operator.build.names import STAGE_LABEL
from pipelinejob_operator.build.place import Shape
from pipelinejob_operator.controller.actions import SetMembership
from pipelinejob_operator.controller.observed import Unplaced
from pipelinejob_operator.policy.reasons import Reason
from tests.unit.operator.builders import NOW, kinds, leaving, manifest, message, seconds, told
from tests.unit.operator.world import World, created, deleted, job, pod, running, spare, stuck, world_text


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

    def test_who_has_given_all_is_not_in_the_epoch_that_fences_a_lost_pod(self) -> None:
        world = running()
        world.spec(stages=3)
        world.settle()
        world.look(released=frozenset({"10.0.0.3"}))
        world.lose("tiny-s3-a0")
        world.settle()
        world.lose("tiny-s1-a0")
        made = world.settle()
        assert made.status.epoch == 3
        assert made.status.group is not None
        assert (made.status.group.leavers, made.status.group.released) == ([], [])
        assert world.memberships()["tiny-s0-a0"].leavers == 0, "nobody waits for a pod that is gone"

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
