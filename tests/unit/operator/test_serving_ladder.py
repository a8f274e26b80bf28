"""A job that serves, whose agents recover by themselves: one stage is replaced, and clients are not touched."""

from dataclasses import replace

from pipelinejob_operator.build.place import Shape
from pipelinejob_operator.controller.observed import Fronts
from pipelinejob_operator.policy import source
from tests.unit.operator.builders import seconds, told
from tests.unit.operator.test_ladder import World, created, deleted, pod
from tests.unit.operator.test_serving import FROM_JOB, served, with_source

TWO = Shape(2)
READY = Fronts(wanted=2, ready=2)


def running(**spec: object) -> World:
    """A Serve job whose two stages are a group."""
    some = served(recovery={"strategy": "Ladder"}, **spec)
    world = World(with_source(some) if "model" in spec else some, pod(0, shape=TWO), pod(1, shape=TWO))
    world.settle(fronts=READY)
    world.take()
    return world


def test_a_lost_stage_alone_gets_a_new_pod() -> None:
    world = running()
    world.lose("tiny-s1-a0")
    made = world.look(fronts=READY)
    assert (told(made)["Running"], told(made)["Available"]) == (("False", "Recovering"), ("False", "NoPipelineReady"))
    world.now += seconds(2)
    world.look(fronts=READY)
    assert created(world.take()) == ["tiny-s1-a0-r1"]


def test_who_leaves_has_nothing_to_give_and_goes_at_once() -> None:
    world = running()
    world.job = served(world.job.status, recovery={"strategy": "Ladder"}, stages=1)
    made = world.look(fronts=READY)
    assert made.status.group is not None
    assert (made.status.group.stages, made.status.group.leavers) == (1, [])
    made = world.look(fronts=READY)
    assert deleted(made.actions) == ["tiny-s1-a0"]
    member = world.memberships()["tiny-s0-a0"]
    assert (member.world_size, member.leavers) == (1, 0), "it waits for nobody"


def test_what_protects_steps_is_nothing_to_a_job_that_makes_none() -> None:
    assert "Protected" not in told(running().look(fronts=READY))


def test_a_lost_stage_waits_for_the_job_that_says_what_the_model_is() -> None:
    world = running(model=FROM_JOB)
    known = world.job
    problem = source.find(known, None)
    world.lose("tiny-s1-a0")
    world.job = replace(known, source=None)
    world.look(fronts=READY, source_problem=problem)
    world.now += seconds(2)
    made = world.look(fronts=READY, source_problem=problem)
    assert created(world.take()) == []
    assert made.look_again_at is not None

    world.job = replace(world.job, source=known.source)
    world.look(fronts=READY)
    assert created(world.take()) == ["tiny-s1-a0-r1"]


def test_on_resume_a_served_job_begins_with_no_step() -> None:
    made = running(suspend=False)
    made.job = replace(made.job, spec=made.job.spec.model_copy(update={"suspend": True}))
    conditions = {item.type: item.message for item in made.look(fronts=READY).status.conditions}
    assert "step 0" not in conditions["Suspended"]
