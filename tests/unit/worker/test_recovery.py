"""What a disturbed run must show: the losses of an undisturbed one, bit by bit, and an honest end."""

import time
from pathlib import Path

import pytest

from pipelinejob_worker.protocol import ExitCode, WorkerConfig
from tests.unit.worker.forked import pipeline, run_to_end
from tests.unit.worker.jobs import history, job
from tests.unit.worker.reference import reference_losses

STEPS = 12


@pytest.fixture
def config(tmp_path: Path) -> WorkerConfig:
    return job(tmp_path, steps=STEPS, dropout="0.1", clip_norm="0.5", every_steps=4)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    return directory


def train_to(step: int, config: WorkerConfig, checkpoints: Path, stages: int = 2) -> None:
    """Leave what a run of ``step`` steps leaves."""
    shorter = config.model_copy(update={"train": config.train.model_copy(update={"steps": step})})
    assert run_to_end(shorter, stages, checkpoints, checkpoints) == [0] * stages


def names(checkpoints: Path) -> list[str]:
    return sorted(path.name for path in checkpoints.glob("step-*"))


@pytest.mark.parametrize(("before", "after"), [(2, 3), (4, 1), (1, 4)])
def test_another_number_of_stages_goes_on_with_the_same_losses(
    tmp_path: Path, config: WorkerConfig, checkpoints: Path, before: int, after: int
) -> None:
    train_to(6, config, checkpoints, before)
    assert run_to_end(config, after, tmp_path, checkpoints, attempt=1) == [0] * after
    assert history(checkpoints) == reference_losses(config, STEPS)
    assert names(checkpoints) == ["step-000000008", "step-000000012"], "the two newest are kept"
    assert (checkpoints / "latest").read_text() == "step-000000012\n"


def test_one_stage_asked_to_drain_stops_all_at_the_same_step(
    tmp_path: Path, config: WorkerConfig, checkpoints: Path
) -> None:
    long = config.model_copy(update={"train": config.train.model_copy(update={"steps": 100_000})})
    with pipeline(long, 3, tmp_path, checkpoints) as stages:
        stages[0].until_step(2)
        stages[1].drain()
        assert [stage.exit_code() for stage in stages] == [ExitCode.DRAINED] * 3
    done = len(history(checkpoints))
    assert 2 <= done < 100_000
    assert names(checkpoints)[-1] == f"step-{done:09d}"

    more = config.model_copy(update={"train": config.train.model_copy(update={"steps": done + 5})})
    assert run_to_end(more, 2, tmp_path, checkpoints, attempt=1) == [0, 0]
    assert history(checkpoints) == reference_losses(more, done + 5)


def flip_a_byte(checkpoint: Path) -> None:
    file = checkpoint / "blocks.1.safetensors"
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)


def truncate_a_file(checkpoint: Path) -> None:
    file = checkpoint / "head.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def lose_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def tear_the_manifest(checkpoint: Path) -> None:
    file = checkpoint / "manifest.json"
    file.write_bytes(file.read_bytes()[:200])


def lose_a_file(checkpoint: Path) -> None:
    (checkpoint / "embedding.safetensors").unlink()


@pytest.mark.parametrize("damage", [flip_a_byte, truncate_a_file, lose_the_manifest, tear_the_manifest, lose_a_file])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, config: WorkerConfig, checkpoints: Path, damage: object
) -> None:
    train_to(8, config, checkpoints)
    damage(checkpoints / "step-000000008")
    with pipeline(config, 2, tmp_path, checkpoints, attempt=1) as stages:
        assert [stage.exit_code() for stage in stages] == [0, 0]
        logs = "".join(stage.log for stage in stages)
    assert "checkpoint is damaged" in logs
    assert logs.count('{"step": 4, "event": "resumed"') == 2
    assert history(checkpoints) == reference_losses(config, STEPS)
    assert names(checkpoints) == ["step-000000008", "step-000000012"], "the damaged one was written anew"


def test_without_any_good_checkpoint_training_starts_at_the_beginning(
    tmp_path: Path, config: WorkerConfig, checkpoints: Path
) -> None:
    train_to(4, config, checkpoints)
    flip_a_byte(checkpoints / "step-000000004")
    assert run_to_end(config, 2, tmp_path, checkpoints, attempt=1) == [0, 0]
    assert history(checkpoints) == reference_losses(config, STEPS)


@pytest.mark.parametrize("victim", [0, 1, 3])
def test_survivors_of_a_killed_stage_say_that_a_peer_is_lost(
    tmp_path: Path, config: WorkerConfig, checkpoints: Path, victim: int
) -> None:
    long = config.model_copy(update={"train": config.train.model_copy(update={"steps": 100_000})})
    with pipeline(long, 4, tmp_path, checkpoints) as stages:
        stages[victim].until_step(5)
        killed = time.monotonic()
        stages[victim].kill()
        codes = [stage.exit_code() for stage in stages]
        assert time.monotonic() - killed < 5
        survivors = [stage for stage in stages if stage is not stages[victim]]
        assert codes.pop(victim) == -9
        assert codes == [ExitCode.PEER_LOST] * 3, "".join(stage.log for stage in survivors)
        assert {stage.failure.reason for stage in survivors} == {"PeerLost"}
    latest = checkpoints / "latest"
    resumable = int(latest.read_text().removeprefix("step-")) if latest.exists() else 0
    more = config.model_copy(update={"train": config.train.model_copy(update={"steps": resumable + 3})})
    assert run_to_end(more, 2, tmp_path, checkpoints, attempt=1) == [0, 0]
    assert history(checkpoints) == reference_losses(more, resumable + 3)


def test_a_finished_job_that_is_started_again_succeeds_at_once(
    tmp_path: Path, config: WorkerConfig, checkpoints: Path
) -> None:
    train_to(STEPS, config, checkpoints)
    (checkpoints / "step-000000099.partial-0").mkdir()
    before = history(checkpoints)
    assert run_to_end(config, 2, tmp_path, checkpoints, attempt=1) == [0, 0]
    assert history(checkpoints) == before
    assert names(checkpoints)[-1] == "step-000000012"
    assert not list(checkpoints.glob("*.partial-*")), "what an earlier attempt left is deleted"


def test_a_checkpoint_of_another_seed_is_refused_by_name(
    tmp_path: Path, config: WorkerConfig, checkpoints: Path
) -> None:
    train_to(4, config, checkpoints)
    other = config.model_copy(update={"train": config.train.model_copy(update={"seed": 8})})
    with pipeline(other, 2, tmp_path, checkpoints, attempt=1) as stages:
        assert [stage.exit_code() for stage in stages] == [ExitCode.CONFIGURATION] * 2
        message = stages[0].failure.message
    assert "seed=7" in message
    assert "seed=8" in message


@pytest.mark.parametrize(
    ("change", "cure"),
    [
        ({"data": {"files": ["/nowhere/*.txt"]}}, "no file matches /nowhere/*.txt"),
        ({"globalBatchSize": 100_000, "microbatches": 50_000}, "at least globalBatchSize 100000"),
        ({"microbatches": 1}, "1 a pipeline is too few for schedule 1F1B on 2 stages"),
        ({"optimizer": {"learningRate": "1e30", "clipNorm": "0"}}, "lower it"),
    ],
)
def test_what_no_restart_can_cure_is_a_final_failure(tmp_path: Path, change: dict[str, object], cure: str) -> None:
    with pipeline(job(tmp_path, **change), 2, tmp_path) as stages:
        assert stages[0].exit_code() == ExitCode.CONFIGURATION
        assert cure in stages[0].failure.message


def test_a_file_where_a_checkpoint_has_to_come_is_replaced(
    tmp_path: Path, config: WorkerConfig, checkpoints: Path
) -> None:
    (checkpoints / "step-000000004").write_text("a file where the directory has to come")
    with pipeline(config, 2, tmp_path, checkpoints) as stages:
        assert [stage.exit_code() for stage in stages] == [0, 0]
        assert "step-000000004/manifest.json: Not a directory" in stages[1].log
    assert names(checkpoints)[-1] == "step-000000012"
    assert all((checkpoints / name).is_dir() for name in names(checkpoints))
    assert history(checkpoints) == reference_losses(config, STEPS)


def test_without_room_for_the_last_checkpoint_a_job_has_not_succeeded(
    tmp_path: Path, config: WorkerConfig, checkpoints: Path
) -> None:
    with pipeline(config, 2, tmp_path, checkpoints, last_file_limit=16384) as stages:
        assert [stage.exit_code() for stage in stages] == [1, 1]
        assert stages[1].log.count("the checkpoint volume failed") >= 2, "the first and the last are never skipped"
        assert "the checkpoint of step 12 was not written: stage 1: File too large" in stages[0].failure.message
        assert "free space on it: the next attempt goes on from step 0" in stages[0].failure.message
    assert names(checkpoints) == [], "what was written in vain takes no room"
    assert len(history(checkpoints)) == STEPS, "training went on to the end"
    assert run_to_end(config, 2, tmp_path, checkpoints, attempt=1) == [0, 0]
    assert history(checkpoints) == reference_losses(config, STEPS)


def test_more_stages_than_layers_is_a_final_failure(tmp_path: Path) -> None:
    with pipeline(job(tmp_path, schedule="GPipe"), 7, tmp_path) as stages:
        assert [stage.exit_code() for stage in stages] == [ExitCode.CONFIGURATION] * 7
        assert "6 layers are too few for 7 chunks" in stages[6].failure.message


def test_a_volume_that_cannot_be_written_is_a_final_failure(tmp_path: Path) -> None:
    with pipeline(job(tmp_path), 1, tmp_path, Path("/proc")) as stages:
        assert stages[0].exit_code() == ExitCode.CONFIGURATION
        assert "/proc cannot be written" in stages[0].failure.message


def test_stages_that_see_other_files_refuse_to_train(tmp_path: Path) -> None:
    with pipeline(job(tmp_path), 2, tmp_path, last=job(tmp_path, data={"files": [__file__]})) as stages:
        assert [stage.exit_code() for stage in stages] == [ExitCode.CONFIGURATION] * 2
        assert "rank 0 and rank 1 see different files" in stages[0].failure.message
