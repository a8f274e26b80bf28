"""A job of several data-parallel pipelines is one gang."""

from pipelinejob_operator.api.status import Status
from pipelinejob_operator.build.job import Job
from pipelinejob_operator.build.place import Shape
from pipelinejob_operator.controller.actions import CreatePod, OpenGate, SetMembership
from pipelinejob_operator.policy.facts import StagePod
from pipelinejob_worker.protocol import AgentStatus, Membership, Progress, StageTiming
from tests.unit.operator.builders import (
    decide,
    ended,
    gated,
    job,
    kinds,
    manifest,
    message,
    pod,
    settled,
    told,
)


class TestPipelines:
    """Two data-parallel copies of two stages are one gang of four pods."""

    SHAPE = Shape(2, 2)

    def job(self, status: Status | None = None, **spec: object) -> Job:
        return job(status, **{"stages": 2, "pipelines": 2, **spec})

    def gang(self, attempt: int = 0, **facts: object) -> list[StagePod]:
        return [
            pod(item.stage, attempt, pipeline=item.pipeline, shape=self.SHAPE, **facts) for item in self.SHAPE.places()
        ]

    def running(self) -> Job:
        return settled(self.job(), *self.gang())

    def test_every_stage_of_every_pipeline_gets_a_pod(self) -> None:
        created = [action.manifest for action in decide(self.job()).actions if isinstance(action, CreatePod)]
        names = [item["metadata"]["name"] for item in created]
        assert names == ["tiny-p0-s0-a0", "tiny-p0-s1-a0", "tiny-p1-s0-a0", "tiny-p1-s1-a0"]

    def test_no_gate_opens_before_all_pods_of_all_pipelines_exist(self) -> None:
        fresh = [gated(item.stage, pipeline=item.pipeline, shape=self.SHAPE) for item in self.SHAPE.places()]
        assert kinds(decide(self.job(), *fresh[:3])) == ["ApplyObject", "ApplyObject", "CreatePod"]
        assert decide(self.job(), *fresh).actions == tuple(OpenGate(one) for one in fresh)

    def test_neighbours_are_in_the_own_pipeline_and_all_meet_at_the_first_stage_of_the_first(self) -> None:
        made = decide(self.job(), *self.gang(membership="", ready=False))
        last = made.actions[3]
        assert isinstance(last, SetMembership)
        told = Membership.model_validate_json(last.value)
        assert (told.stage, told.stages, told.pipeline, told.pipelines) == (1, 2, 1, 2)
        assert (told.rank, told.world_size) == (3, 4)
        assert (told.master_address, told.previous_address, told.next_address) == ("10.0.0.0", "10.0.0.2", "")

    def test_agents_that_know_one_pipeline_alone_must_refuse_it(self) -> None:
        (first, *_) = decide(self.job(), *self.gang(membership="", ready=False)).actions
        assert isinstance(first, SetMembership)
        assert Membership.model_validate_json(first.value).oldest_reader == 3

    def test_the_status_has_an_entry_for_each_and_counts_all(self) -> None:
        status = decide(self.running(), *self.gang()).status
        assert [(item.index, item.pipeline) for item in status.stages] == [(0, 0), (1, 0), (0, 1), (1, 1)]
        assert (status.ready_stages, status.summary.stages, status.summary.state) == (4, "4/4", "Running")

    def test_the_times_of_a_stage_are_shown_for_each_of_its_copies(self) -> None:
        progress = Progress(step=1, total_steps=2, stages=(StageTiming(stage=1, busy_percent=60, layers="3-5"),))
        agent = AgentStatus(job_uid="job-uid", stage=0, epoch=1, state="Running", progress=progress)
        stages = decide(self.running(), *self.gang(), agent=agent).status.stages
        assert [item.busy_percent for item in stages] == [None, 60, None, 60]

    def test_a_failure_in_one_pipeline_replaces_all(self) -> None:
        pods = self.gang()
        pods[2] = ended(0, 1, pipeline=1, shape=self.SHAPE)
        made = decide(self.running(), *pods)
        assert (made.status.attempt, made.status.restarts) == (1, 1)
        assert made.status.first_failure is not None
        assert (made.status.first_failure.stage, made.status.first_failure.pipeline) == (0, 1)
        assert [item.restarts for item in made.status.stages] == [0, 0, 1, 0]
        assert "stage 0 of pipeline 1" in message(made, "Running")

    def test_another_number_of_pipelines_replaces_the_gang_and_it_counts_as_no_failure(self) -> None:
        grown = Job.read(manifest(self.running().status, stages=2, pipelines=4))
        made = decide(grown, *self.gang())
        assert (made.status.attempt, made.status.restarts) == (1, 0)
        assert told(made)["Running"] == ("False", "Replacing")
        assert "4 pipelines of 2 stages" in message(made, "Running")

    def test_as_many_pods_in_another_shape_are_another_gang(self) -> None:
        some = settled(self.job(stages=4, pipelines=1), *self.gang())
        assert some.status.attempt == 1

    def test_it_succeeds_when_every_stage_of_every_pipeline_has(self) -> None:
        ends = [ended(item.stage, 0, pipeline=item.pipeline, shape=self.SHAPE) for item in self.SHAPE.places()]
        assert told(decide(self.running(), *ends[:3], self.gang()[3]))["Succeeded"] == ("Unknown", "Active")
        assert told(decide(self.running(), *ends))["Succeeded"] == ("True", "AllStagesSucceeded")
