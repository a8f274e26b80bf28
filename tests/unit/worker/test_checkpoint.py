"""A checkpoint is complete or not there; who may use it; what is kept and what is deleted."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from pydantic import ValidationError
from torch.distributed import checkpoint as distributed_checkpoint

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.state.checkpoint import CheckpointDamagedError, CheckpointStore, Written, global_names
from pipelinejob_worker.state.history import History
from tests.unit.worker.checkpoints import NAMES, SHAPES, content_of, layer, read, same, save, store


def listing(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def write_parts(to: CheckpointStore, step: int, parts: int, missing: set[tuple[str, int]] = frozenset()) -> None:
    for part in range(parts):
        files = {
            name: to.write_layer(step, name, content_of(name, layer(index, step, part, parts)), part=part, parts=parts)
            for index, name in enumerate(NAMES)
            if (name, part) not in missing
        }
        to.write_list(step, part, Written(part=part, layers=files))


def test_a_published_checkpoint_is_read_back_bit_by_bit(tmp_path: Path) -> None:
    save(store(tmp_path), 120)
    assert listing(tmp_path) == ["latest", "step-000000120"]
    assert (tmp_path / "latest").read_text() == "step-000000120\n"
    assert listing(tmp_path / "step-000000120") == sorted([*(f"{name}.safetensors" for name in NAMES), "manifest.json"])
    again = store(tmp_path)
    assert again.complete_steps() == [120]
    assert same(read(again, 120), 120)


@pytest.mark.parametrize("parts", [1, 2])
def test_torch_reads_a_checkpoint_by_global_names(tmp_path: Path, parts: int) -> None:
    write_parts(store(tmp_path), 7, parts)
    store(tmp_path).publish(7, NAMES, ranks=parts, parts=parts, extra={})
    wanted = {
        key: tensor for index, name in enumerate(NAMES) for key, tensor in global_names(name, layer(index, 7)).items()
    }
    state = {key: torch.zeros_like(tensor) for key, tensor in wanted.items()}
    reader = distributed_checkpoint.HuggingFaceStorageReader(str(tmp_path / "step-000000007"))
    distributed_checkpoint.load(state, storage_reader=reader, no_dist=True)
    assert all(torch.equal(state[key], tensor) for key, tensor in wanted.items())


def test_names_of_workers_before_protocol_4_are_read(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    file = checkpoints.write_layer(7, "head", safetensors.torch.save(layer(0, 7)))
    checkpoints.write_list(7, 0, Written(part=0, layers={"head": file}))
    checkpoints.publish(7, ["head"], ranks=1, extra={})
    assert same({0: checkpoints.read_layer(checkpoints.manifest(7), "head", SHAPES)}, 7)


def test_parts_of_a_layer_are_read_as_one(tmp_path: Path) -> None:
    write_parts(store(tmp_path), 7, parts=4)  # more parts than parameters: the last one is empty
    store(tmp_path).publish(7, NAMES, ranks=4, parts=4, extra={})
    assert "head.part-3.safetensors" in listing(tmp_path / "step-000000007")
    assert same(read(store(tmp_path), 7), 7)


@pytest.mark.parametrize("missing", [("head", 0), ("blocks.1", 1)])
def test_nothing_is_published_that_is_not_all_there(tmp_path: Path, missing: tuple[str, int]) -> None:
    write_parts(store(tmp_path), 7, parts=2, missing={missing})
    with pytest.raises(CheckpointDamagedError, match=f"no rank has written part {missing[1]} of layer {missing[0]}"):
        store(tmp_path).publish(7, NAMES, ranks=2, parts=2, extra={})
    assert store(tmp_path).complete_steps() == []


def test_a_tensor_in_two_parts_is_damage(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    content = safetensors.torch.save(layer(0, 7))
    for part in range(2):
        file = checkpoints.write_layer(7, "head", content, part=part, parts=2)
        checkpoints.write_list(7, part, Written(part=part, layers={"head": file}))
    checkpoints.publish(7, ["head"], ranks=2, parts=2, extra={})
    with pytest.raises(CheckpointDamagedError, match=r"head\.part-1\.safetensors: tensor exp_avg\.bias is in another"):
        checkpoints.read_layer(checkpoints.manifest(7), "head", SHAPES)


def test_the_manifest_says_whose_it_is_and_what_else_training_must_know(tmp_path: Path) -> None:
    save(store(tmp_path, attempt=3), 120)
    manifest = json.loads((tmp_path / "step-000000120" / "manifest.json").read_text())
    assert (manifest["step"], manifest["fingerprint"], manifest["attempt"]) == (120, "toy seed=0", 3)
    assert set(manifest["layers"]) == set(NAMES)
    assert store(tmp_path).manifest(120).extra == {"goodSteps": 120}


def test_one_part_is_written_as_workers_that_know_no_parts_read_it_and_what_they_wrote_is_read(tmp_path: Path) -> None:
    save(store(tmp_path), 120)
    path = tmp_path / "step-000000120" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert all(file.keys() == {"size", "sha256"} for file in manifest["layers"].values())
    del manifest["extra"]
    path.write_text(json.dumps(manifest))
    assert same(read(store(tmp_path), 120), 120)
    assert store(tmp_path).manifest(120).extra == {}


def test_extra_state_keeps_type_and_value_and_is_finite(tmp_path: Path) -> None:
    extra = {"lossScale": 65536.0, "goodSteps": 3, "tiny": 0.1 + 0.2}
    write_parts(store(tmp_path), 7, parts=1)
    store(tmp_path).publish(7, NAMES, ranks=1, extra=extra)
    read_back = store(tmp_path).manifest(7).extra
    assert read_back == extra
    assert [type(value) for value in read_back.values()] == [float, int, float]
    write_parts(store(tmp_path), 8, parts=1)
    with pytest.raises(ValidationError, match="finite"):
        store(tmp_path).publish(8, NAMES, ranks=1, extra={"lossScale": float("inf")})


@pytest.mark.parametrize("name", ["../../outside", "a/b", "..", "/etc/passwd", "zwölf"])
def test_a_layer_of_any_name_stays_in_its_directory(tmp_path: Path, name: str) -> None:
    checkpoints = store(tmp_path / "volume")
    (tmp_path / "volume").mkdir()
    file = checkpoints.write_layer(1, name, safetensors.torch.save(layer(0, 1)))
    checkpoints.write_list(1, 0, Written(part=0, layers={name: file}))
    checkpoints.publish(1, [name], ranks=1, extra={})
    assert same({0: checkpoints.read_layer(checkpoints.manifest(1), name, SHAPES)}, 1)
    assert (listing(tmp_path), listing(tmp_path / "volume")) == (["volume"], ["latest", "step-000000001"])
    assert len(listing(tmp_path / "volume" / "step-000000001")) == 2


def test_a_checkpoint_without_publication_does_not_count(tmp_path: Path) -> None:
    save(store(tmp_path), 10)
    store(tmp_path, attempt=1).write_layer(20, "head", b"")
    assert store(tmp_path).complete_steps() == [10]


def test_attempts_do_not_write_into_each_others_partial_checkpoint(tmp_path: Path) -> None:
    write_parts(store(tmp_path, attempt=1), 20, parts=1)
    store(tmp_path, attempt=0).write_layer(20, "head", b"of an attempt that should have ended")
    store(tmp_path, attempt=1).publish(20, NAMES, ranks=1, extra={})
    assert same(read(store(tmp_path), 20), 20)


def test_a_step_that_an_earlier_attempt_completed_late_is_replaced(tmp_path: Path) -> None:
    save(store(tmp_path, attempt=0), 20)
    save(store(tmp_path, attempt=1), 20)
    assert store(tmp_path).manifest(20).attempt == 1
    store(tmp_path, attempt=1).retain(1)
    assert listing(tmp_path) == ["latest", "step-000000020"]


def test_retention_keeps_the_newest_and_removes_what_crashes_left(tmp_path: Path) -> None:
    checkpoints = store(tmp_path, attempt=1)
    store(tmp_path, attempt=0).write_layer(35, "head", b"")
    (tmp_path / "step-000000005.deleted-0").mkdir()
    (tmp_path / "notes.txt").write_text("the user's own")
    for step in (10, 20, 30, 40):
        save(checkpoints, step)
    checkpoints.distrust(40)
    checkpoints.retain(2)
    assert listing(tmp_path) == ["latest", "notes.txt", "step-000000020", "step-000000030"]


def test_a_distrusted_checkpoint_is_replaced_when_its_step_is_saved_again(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    save(checkpoints, 10)
    (tmp_path / "step-000000010" / "head.safetensors").unlink()
    checkpoints.distrust(10)
    assert checkpoints.complete_steps() == []
    save(checkpoints, 10)
    assert checkpoints.complete_steps() == [10]
    assert same(read(checkpoints, 10), 10)


def test_another_model_is_refused_with_both_names(tmp_path: Path) -> None:
    save(store(tmp_path), 10)
    with pytest.raises(ConfigurationError, match=r"toy seed=0.*toy seed=1.*use another claim"):
        CheckpointStore(tmp_path, "toy seed=1", 0).manifest(10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight.matrix": (4, 3)}, r"tensor weight\.matrix with shape \(3, 4\), this job has \(4, 3\)"),
        ({"momentum.bias": (4,)}, r"tensor momentum\.bias with shape none, this job has \(4,\)"),
    ],
)
def test_tensors_of_another_job_are_refused_and_not_taken_for_damage(
    tmp_path: Path, change: dict[str, tuple[int, ...]], message: str
) -> None:
    checkpoints = store(tmp_path)
    save(checkpoints, 10)
    with pytest.raises(ConfigurationError, match=rf"volumeClaimName: .*layer head .*{message}.*use another claim"):
        checkpoints.read_layer(checkpoints.manifest(10), "head", SHAPES | change)


def test_a_manifest_of_another_step_is_damage(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    save(checkpoints, 10)
    (tmp_path / "step-000000010").rename(tmp_path / "step-000000020")
    with pytest.raises(CheckpointDamagedError, match="is of step 10"):
        checkpoints.manifest(20)


def test_a_file_that_is_as_written_but_no_safetensors_is_damage(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    file = checkpoints.write_layer(10, "head", b"not a header")
    checkpoints.write_list(10, 0, Written(part=0, layers={"head": file}))
    checkpoints.publish(10, ["head"], ranks=1, extra={})
    with pytest.raises(CheckpointDamagedError, match=r"head\.safetensors: .*header"):
        checkpoints.read_layer(checkpoints.manifest(10), "head", SHAPES)


def test_a_writable_volume_is_left_as_it_was(tmp_path: Path) -> None:
    store(tmp_path).check_writable(rank=2)
    assert listing(tmp_path) == []


def test_a_missing_volume_is_refused_with_a_cure(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"spec\.checkpoint\.volumeClaimName: .*No such file.*correct the claim"
    ):
        store(tmp_path / "missing").check_writable(rank=0)


def test_history_goes_on_where_training_resumes(tmp_path: Path) -> None:
    first = History(tmp_path, 0)
    for step in (1, 2, 3):
        first.append(step, 1 / 3)
    first.close()
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # as a crash leaves it
    second = History(tmp_path, 2)
    second.append(3, 0.1 + 0.2)
    second.sync()
    second.close()
    assert [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()] == [
        {"step": 1, "loss": 1 / 3},
        {"step": 2, "loss": 1 / 3},
        {"step": 3, "loss": 0.1 + 0.2},
    ]
