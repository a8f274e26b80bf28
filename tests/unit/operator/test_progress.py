"""What agents tell, as the status shows it."""

from dataclasses import replace
from typing import ClassVar

import pytest

from pipelinejob_operator.build.job import Job
from pipelinejob_operator.controller.plan import Plan
from pipelinejob_worker.protocol import AgentStatus, ExitCode, Progress, StageTiming
from tests.unit.operator.builders import (
    decide,
    ended,
    manifest,
    message,
    pod,
    running_job,
    settled,
    told,
)


class TestProgress:
    def test_what_an_agent_says_is_rounded_for_people(self) -> None:
        progress = Progress(
            step=120,
            total_steps=200,
            loss=2.31234,
            tokens_per_second=14_211.7,
            bubble_percent=29.4,
            remaining_seconds=40.2,
        )
        agent = AgentStatus(job_uid="job-uid", stage=0, epoch=1, state="Running", progress=progress)
        summary = decide(running_job(), pod(0), pod(1), pod(2), agent=agent).status.summary
        assert (summary.step, summary.progress, summary.loss) == ("120/200", "60%", "2.31")
        assert (summary.tokens_per_second, summary.bubble) == ("14.2k", "29%")

    def test_times_and_rates_are_whole_numbers_with_their_unit_in_the_name(self) -> None:
        progress = Progress(
            step=120,
            total_steps=200,
            step_seconds=1.2346,
            step_predicted_seconds=1.2,
            bubble_limit_percent=27.3,
            bubble_predicted_percent=28.6,
            model_flops_percent=41.4,
            model_tera_flops=0.0123,
            validation_loss=2.71828,
            validation_step=100,
            skipped_steps=2,
        )
        agent = AgentStatus(job_uid="job-uid", stage=0, epoch=1, state="Running", progress=progress)
        status = decide(running_job(), pod(0), pod(1), pod(2), agent=agent).status
        shown = status.progress
        assert (shown.step_milliseconds, shown.step_predicted_milliseconds) == (1235, 1200)
        assert (shown.bubble_limit_percent, shown.bubble_predicted_percent) == (27, 29)
        assert (shown.model_flops_percent, shown.model_giga_flops_per_second) == (41, 12)
        assert (shown.validation_loss, shown.validation_step, shown.skipped_steps) == ("2.718", 100, 2)
        assert (status.summary.bubble_limit, status.summary.model_flops) == ("27%", "41%")

    def test_each_stage_shows_where_its_time_went(self) -> None:
        shares = {"forward": 25, "backward": 35, "weight": 10, "update": 5, "waiting": 20, "sending": 3}
        timing = {"stage": 1, "busyPercent": 70, "layers": "3-5"} | {f"{name}Percent": n for name, n in shares.items()}
        progress = Progress(step=1, total_steps=2, stages=(StageTiming.model_validate(timing),))
        agent = AgentStatus(job_uid="job-uid", stage=0, epoch=1, state="Running", progress=progress)
        shown = decide(running_job(), pod(0), pod(1), pod(2), agent=agent).status.stages[1].model_dump()
        assert {name: shown[f"{name}_percent"] for name in shares} == shares

    def test_without_an_agents_answer_the_last_one_stays(self) -> None:
        progress = Progress(step=120, total_steps=200)
        agent = AgentStatus(job_uid="job-uid", stage=0, epoch=1, state="Running", progress=progress)
        known = settled(running_job(), pod(0), pod(1), pod(2), agent=agent)
        assert decide(known, pod(0), pod(1), pod(2)).status.progress.step == 120

    def test_stages_that_left_in_good_order_say_where_and_what_they_saved(self) -> None:
        some = running_job(checkpoint={"volumeClaimName": "saves"})
        stopping = Job.read(manifest(some.status, suspend=True, checkpoint={"volumeClaimName": "saves"}))
        drained = [ended(stage, ExitCode.DRAINED, step=17) for stage in range(3)]
        progress = settled(settled(stopping, pod(0), pod(1), pod(2)), *drained).status.progress
        assert (progress.step, progress.total_steps, progress.last_checkpoint_step) == (17, 200, 17)

    def test_a_stage_that_failed_saved_nothing(self) -> None:
        some = running_job(checkpoint={"volumeClaimName": "saves"})
        assert settled(some, pod(0), ended(1, 1, step=17), pod(2)).status.progress.last_checkpoint_step == 0

    def test_a_command_of_the_users_own_shows_no_step(self) -> None:
        template = {"spec": {"containers": [{"name": "worker", "command": ["torchrun"]}]}}
        made = decide(running_job(template=template), *(ended(stage, 0) for stage in range(3)))
        assert (made.status.summary.step, made.status.summary.progress) == ("", "")
        assert made.status.summary.state == "Succeeded"


class TestCheckpointed:
    """The condition of the newest checkpoint: only where a volume is set, in the worker's words."""

    SPEC: ClassVar = {"checkpoint": {"volumeClaimName": "saves"}}

    def seen(self, some: Job, **progress: object) -> Plan:
        told = Progress.model_validate({"step": 60, "total_steps": 200, **progress})
        agent = AgentStatus(job_uid="job-uid", stage=0, epoch=1, state="Running", progress=told)
        return decide(some, pod(0), pod(1), pod(2), agent=agent)

    def test_without_a_volume_there_is_none(self) -> None:
        assert "Checkpointed" not in told(self.seen(running_job(), last_checkpoint_step=50))

    def test_a_command_of_the_users_own_tells_of_none(self) -> None:
        template = {"spec": {"containers": [{"name": "worker", "command": ["torchrun"]}]}}
        assert "Checkpointed" not in told(decide(running_job(template=template, **self.SPEC), pod(0), pod(1), pod(2)))

    def test_it_is_unknown_until_the_first_is_written(self) -> None:
        assert told(self.seen(running_job(**self.SPEC)))["Checkpointed"] == ("Unknown", "NotSavedYet")

    def test_it_names_the_newest_step(self) -> None:
        made = self.seen(running_job(**self.SPEC), last_checkpoint_step=50)
        assert told(made)["Checkpointed"] == ("True", "Saved")
        assert message(made, "Checkpointed") == "the newest checkpoint is of step 50"

    @pytest.mark.parametrize(("damaged", "reason"), [(False, "CheckpointFailed"), (True, "CheckpointDamaged")])
    def test_a_problem_is_told_in_the_workers_words_and_by_an_event(self, damaged: bool, reason: str) -> None:
        words = "the checkpoint of step 50 was not written: no space is left on the volume"
        made = self.seen(running_job(**self.SPEC), checkpoint_problem=words, checkpoint_damaged=damaged)
        assert told(made)["Checkpointed"] == ("False", reason)
        assert message(made, "Checkpointed") == words
        assert [(item.kind, item.reason) for item in made.notices] == [("Warning", reason)]

    def test_the_next_success_makes_it_true_again(self) -> None:
        some = running_job(**self.SPEC)
        failed = replace(some, status=self.seen(some, checkpoint_problem="no space").status)
        assert told(self.seen(failed, last_checkpoint_step=100))["Checkpointed"] == ("True", "Saved")
