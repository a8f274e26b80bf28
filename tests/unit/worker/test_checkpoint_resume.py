"""Which checkpoint training goes on from: the newest that every rank can read, and all ranks know why."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelinejob_worker.errors import ConfigurationError
from tests.unit.worker.checkpoints import Job, same


def flip_a_byte(checkpoint: Path) -> None:
    file = checkpoint / "blocks.1.part-1.safetensors"
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)


def truncate_a_file(checkpoint: Path) -> None:
    file = checkpoint / "head.part-0.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def lose_a_part(checkpoint: Path) -> None:
    (checkpoint / "embedding.part-1.safetensors").unlink()


def lose_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def tear_the_manifest(checkpoint: Path) -> None:
    file = checkpoint / "manifest.json"
    file.write_bytes(file.read_bytes()[:200])


def spoil_the_manifest(checkpoint: Path) -> None:
    file = checkpoint / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fingerprint": 5}))


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (flip_a_byte, "stage 1: {}/blocks.1.part-1.safetensors: the SHA-256 is not that of the manifest"),
        (truncate_a_file, "stage 2: {}/head.part-0.safetensors: has 568 bytes instead of 668"),
        (lose_a_part, "stage 0: {}/embedding.part-1.safetensors: No such file or directory"),
        (lose_the_manifest, "stage 0: {}/manifest.json: No such file or directory"),
        (tear_the_manifest, "stage 0: {}/manifest.json: Invalid JSON: EOF while parsing"),
        (spoil_the_manifest, "stage 0: {}/manifest.json: Input should be a valid string at fingerprint"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_all_ranks_know_file_and_cause(
    tmp_path: Path, damage: Callable[[Path], None], cause: str
) -> None:
    before = Job(tmp_path, stages=2, pipelines=2)
    before.save(10)
    before.save(20)
    damage(tmp_path / "step-000000020")
    job = Job(tmp_path, stages=3, attempt=1)
    assert all(resumed.step == 10 and same(resumed.layers, 10) for resumed in job.resumed)
    expected = f"the checkpoint of step 20 was not used: {cause.format(tmp_path / 'step-000000020')}"
    assert job.problem.startswith(expected)
    assert job.problem.endswith("; training went on from step 10")
    assert job.saved_step == 10
    job.save(20)
    assert job.problem == ""
    assert all(same(resumed.layers, 20) and not resumed.problem for resumed in Job(tmp_path, 1).resumed)


def test_a_file_where_a_checkpoint_has_to_come_is_damage_and_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "step-000000020").write_text("not a directory")
    job = Job(tmp_path, 2)
    assert job.problem == (
        f"the checkpoint of step 20 was not used: stage 0: {tmp_path}/step-000000020/manifest.json: Not a directory; "
        "training went on from step 0"
    )
    job.save(20)
    assert (job.saved_step, job.problem) == (20, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000000020"]


def test_the_newest_problem_is_told_when_none_is_good(tmp_path: Path) -> None:
    before = Job(tmp_path, stages=1, pipelines=2)
    before.save(10)
    before.save(20)
    lose_the_manifest(tmp_path / "step-000000010")
    flip_a_byte(tmp_path / "step-000000020")
    job = Job(tmp_path, stages=2, attempt=1)
    assert [(resumed.step, resumed.layers) for resumed in job.resumed] == [(0, {}), (0, {})]
    assert "step 20 was not used: stage 1" in job.problem
    assert job.problem.endswith("training went on from step 0")


def test_a_long_cause_is_cut_so_that_it_fits_a_status(tmp_path: Path) -> None:
    deep = tmp_path / ("ä" * 100) / ("ö" * 100)
    deep.mkdir(parents=True)
    Job(deep, 1).save(10)
    lose_the_manifest(deep / "step-000000010")
    problem = Job(deep, 2, attempt=1).problem
    assert len(problem.encode()) < 500
    assert problem.startswith("the checkpoint of step 10 was not used: stage 0: /")


def test_an_empty_volume_is_no_problem(tmp_path: Path) -> None:
    job = Job(tmp_path, 2)
    assert (job.saved_step, job.problem) == (0, "")


def test_what_an_earlier_attempt_did_not_finish_is_deleted(tmp_path: Path) -> None:
    (tmp_path / "step-000000099.partial-0").mkdir()
    (tmp_path / "step-000000010.deleted-0").mkdir()
    Job(tmp_path, 2, attempt=1)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_other_tensors_ends_the_job_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Job(tmp_path, 1).save(10)
    monkeypatch.setattr("tests.unit.worker.checkpoints.SHAPES", {"weight.matrix": (3, 4), "momentum.matrix": (3, 4)})
    with pytest.raises(ConfigurationError, match=r"the same model and optimizer; use another claim"):
        Job(tmp_path, 1, attempt=1)
    assert (tmp_path / "step-000000010" / "manifest.json").exists()
