"""The agent's decisions, which are pure: which membership counts, what an end means, what is shown."""

import json

import pytest

from pipelinejob_worker.agent.ending import Ending, of_worker, termination
from pipelinejob_worker.agent.pod_info import newer_membership
from pipelinejob_worker.agent.settings import from_environment
from pipelinejob_worker.agent.status_server import metrics
from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.protocol import AgentStatus, ExitCode, Membership, Progress, Serving, StageTiming, Termination


def text(epoch: int, **members: object) -> str:
    values = {"action": "Run", "stage": 2, "stages": 4, "master_address": "a", "master_port": 1}
    return Membership.model_validate({"epoch": epoch, **values, **members}).to_json()


@pytest.mark.parametrize(("epoch", "seen", "counts"), [(1, 0, True), (5, 4, True), (4, 4, False), (3, 4, False)])
def test_only_a_newer_epoch_counts(epoch: int, seen: int, counts: bool) -> None:
    assert (newer_membership(text(epoch), (2, 0), seen) is not None) == counts


@pytest.mark.parametrize("empty", ["", "\n"])
def test_an_empty_file_is_no_membership_yet(empty: str) -> None:
    assert newer_membership(empty, (2, 0), 0) is None


def test_an_old_membership_of_another_stage_is_only_old() -> None:
    assert newer_membership(text(3, stage=1), (2, 0), 4) is None


def test_the_same_stage_of_another_pipeline_is_another_pods() -> None:
    second = text(1, pipeline=1, pipelines=2)
    assert newer_membership(second, (2, 1), 0).world_size == 8
    with pytest.raises(
        ConfigurationError, match="is of stage 2 of pipeline 1; allowed: this pod's stage 2 of pipeline 0"
    ):
        newer_membership(second, (2, 0), 0)


def test_a_member_that_a_newer_operator_added_does_no_harm() -> None:
    newer = json.loads(text(1)) | {"addedLater": {"x": 1}}
    assert newer_membership(json.dumps(newer), (2, 0), 0).epoch == 1


def test_progress_decides_whether_exit_code_0_is_success() -> None:
    assert of_worker(0, None, Progress(step=12, total_steps=12)).code == ExitCode.SUCCEEDED
    assert of_worker(0, None, Progress(step=11, total_steps=12)).code == 1
    assert of_worker(0, None, Progress()).code == 1
    assert of_worker(0, None, Progress(serving=Serving())).code == ExitCode.SUCCEEDED, "only stage 0 knows a file"
    assert of_worker(0, None, Progress(step=11, total_steps=12, serving=Serving())).code == 1


def test_the_termination_message_fits_and_keeps_the_newest_lines() -> None:
    tail = [f"{number} " + "ü" * 300 for number in range(32)]
    content = termination(1, Ending(1, "Error", "\x00" * 5000), Progress(step=7), tail)
    message = Termination.model_validate_json(content)
    assert len(content) <= 4096
    assert (message.stage, message.exit_code, message.reason, message.step) == (1, 1, "Error", 7)

    content = termination(1, Ending(1, "Error", "short"), Progress(step=7), tail)
    message = Termination.model_validate_json(content)
    assert len(content) <= 4096
    assert message.message == "short"
    assert list(message.log_tail) == tail[-len(message.log_tail) :]
    assert len(message.log_tail) >= 5


def test_the_termination_message_holds_the_progress_and_of_few_stages_the_timings() -> None:
    for stages, kept in ((4, 4), (512, 0)):
        timings = tuple(StageTiming(stage=stage, busy_percent=50, layers="0-2") for stage in range(stages))
        progress = Progress(step=7, loss=1.5, stages=timings)
        message = Termination.model_validate_json(termination(1, Ending(0, "Succeeded", ""), progress, ["x" * 300] * 8))
        assert message.progress is not None
        assert (message.progress.loss, len(message.progress.stages), len(message.log_tail)) == (1.5, kept, 8)


def test_the_termination_message_fits_whatever_the_checkpoint_said() -> None:
    timing = StageTiming(stage=0, busy_percent=50, layers=",".join(f"{n}-{n + 2}" for n in range(0, 48, 3)))
    progress = Progress(step=7, checkpoint_problem="\x00" * 4096, stages=(timing,) * 8)
    content = termination(1, Ending(1, "Error", "why"), progress, ["x"] * 8)
    message = Termination.model_validate_json(content)
    assert len(content) <= 4096
    assert message.message == "why"
    assert message.progress is not None
    assert message.progress.checkpoint_problem


def test_metrics_have_base_units_and_the_times_of_the_own_stage() -> None:
    timings = [StageTiming(stage=stage, busy_percent=70 + stage, waiting_percent=20) for stage in range(2)]
    progress = Progress(step_seconds=1.25, model_tera_flops=0.5, model_flops_percent=41, checkpoint_problem="full")
    progress = progress.model_copy(update={"stages": tuple(timings)})
    lines = metrics(AgentStatus(job_uid="u", stage=1, epoch=3, state="Running", progress=progress)).splitlines()
    for name, value in {
        "step_seconds": 1.25,
        "model_flops_per_second": 5e11,
        "model_flops_ratio": 0.41,
        "checkpoint_problem": 1.0,
        "busy_ratio": 0.71,
        "waiting_ratio": 0.2,
    }.items():
        assert f'pipelinejob_stage_{name}{{stage="1"}} {value}' in lines
    assert not [line for line in lines if "forward" in line], "a worker of protocol 2 does not tell it"


def test_the_metrics_of_a_stage_that_serves_have_the_usual_names() -> None:
    serving = Serving(requests_per_second=2.5, queued=3, running=4, cache_percent=25, preemptions=1)
    status = AgentStatus(job_uid="u", stage=0, epoch=3, state="Running", progress=Progress(serving=serving))
    lines = metrics(status).splitlines()
    for name, value in {
        "requests_per_second": 2.5,
        "requests_waiting": 3,
        "requests_running": 4,
        "kv_cache_usage_ratio": 0.25,
        "preemptions": 1,
    }.items():
        assert f'pipelinejob_stage_{name}{{stage="0"}} {value}' in lines


def test_metrics_leave_out_what_is_not_known() -> None:
    status = AgentStatus(job_uid="u", stage=1, epoch=3, state="Running", progress=Progress(step=5, total_steps=9))
    lines = metrics(status).splitlines()
    assert 'pipelinejob_stage_running{stage="1"} 1.0' in lines
    assert 'pipelinejob_stage_epoch{stage="1"} 3' in lines
    assert 'pipelinejob_stage_step{stage="1"} 5' in lines
    assert not [line for line in lines if "stage_loss" in line or "bubble" in line or "busy" in line]


def test_the_environment_says_which_stage_this_is() -> None:
    settings = from_environment(
        {"PIPELINE_STAGE": "2", "PIPELINEJOB_ATTEMPT": "1", "PIPELINEJOB_NAME": "j", "PIPELINEJOB_UID": "u"}
    )
    assert (settings.stage, settings.attempt, settings.job, settings.job_uid) == (2, 1, "j", "u")
    assert settings.pipeline == 0, "operators of protocol 2 make one pipeline and do not number it"
    assert from_environment({"PIPELINE_STAGE": "2", "PIPELINE_INDEX": "3"}).pipeline == 3
    with pytest.raises(ConfigurationError, match=r"PIPELINE_STAGE: '' is not a number.*start the pod through"):
        from_environment({})
    with pytest.raises(ConfigurationError, match="PIPELINE_STAGE: '-1' is not a number"):
        from_environment({"PIPELINE_STAGE": "-1"})
