"""A checkpoint is complete or not there; what survives a full volume; what is kept and what is deleted."""

import json
from pathlib import Path

import pytest
import torch

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.state.checkpoint import CheckpointDamagedError, CheckpointStore
from pipelinejob_worker.state.history import History

LAYERS = {"embedding": {"weight.token": torch.arange(6.0).view(2, 3)}, "head": {"weight.norm": torch.ones(4)}}
SHAPES = {name: {key: tuple(tensor.shape) for key, tensor in layer.items()} for name, layer in LAYERS.items()}


def store(directory: Path, fingerprint: str = "gpt seed=0", attempt: int = 0) -> CheckpointStore:
    return CheckpointStore(directory, fingerprint, attempt)


def save(to: CheckpointStore, step: int) -> None:
    to.publish(step, {name: to.write_layer(step, name, tensors) for name, tensors in LAYERS.items()})


def listing(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_published_checkpoint_is_read_back_bit_by_bit(tmp_path: Path) -> None:
    save(store(tmp_path), 120)
    assert listing(tmp_path) == ["latest", "step-000000120"]
    assert listing(tmp_path / "step-000000120") == ["embedding.safetensors", "head.safetensors", "manifest.json"]
    again = store(tmp_path)
    assert again.complete_steps() == [120]
    for name, layer in LAYERS.items():
        read = again.read_layer(again.manifest(120), name, SHAPES[name])
        assert all(torch.equal(read[key], tensor) for key, tensor in layer.items())


def test_the_manifest_says_whose_it_is(tmp_path: Path) -> None:
    save(store(tmp_path, attempt=3), 120)
    manifest = json.loads((tmp_path / "step-000000120" / "manifest.json").read_text())
    assert (manifest["step"], manifest["fingerprint"], manifest["attempt"]) == (120, "gpt seed=0", 3)
    assert set(manifest["layers"]) == {"embedding", "head"}


def test_a_checkpoint_without_publication_does_not_count(tmp_path: Path) -> None:
    save(store(tmp_path), 10)
    store(tmp_path, attempt=1).write_layer(20, "embedding", LAYERS["embedding"])
    assert store(tmp_path).complete_steps() == [10]


def test_attempts_do_not_write_into_each_others_partial_checkpoint(tmp_path: Path) -> None:
    old, new = store(tmp_path, attempt=0), store(tmp_path, attempt=1)
    files = {name: new.write_layer(20, name, tensors) for name, tensors in LAYERS.items()}
    old.write_layer(20, "head", {"weight.norm": torch.zeros(4)})
    new.publish(20, files)
    assert torch.equal(new.read_layer(new.manifest(20), "head", SHAPES["head"])["weight.norm"], torch.ones(4))


def test_retention_keeps_the_newest_and_removes_what_crashes_left(tmp_path: Path) -> None:
    checkpoints = store(tmp_path, attempt=1)
    store(tmp_path, attempt=0).write_layer(35, "head", LAYERS["head"])
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
    assert checkpoints.read_layer(checkpoints.manifest(10), "head", SHAPES["head"])


def test_another_model_is_refused_with_both_names(tmp_path: Path) -> None:
    save(store(tmp_path, "gpt layers=2 seed=0"), 10)
    with pytest.raises(ConfigurationError, match=r"gpt layers=2 seed=0.*gpt layers=4 seed=0.*use another claim"):
        store(tmp_path, "gpt layers=4 seed=0").manifest(10)


@pytest.mark.parametrize("shape", [(3, 2), (6,)])
def test_other_shapes_are_damage(tmp_path: Path, shape: tuple[int, ...]) -> None:
    checkpoints = store(tmp_path)
    save(checkpoints, 10)
    with pytest.raises(CheckpointDamagedError, match="shapes are not those of layer embedding"):
        checkpoints.read_layer(checkpoints.manifest(10), "embedding", {"weight.token": shape})


def test_a_manifest_of_another_step_is_damage(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    save(checkpoints, 10)
    (tmp_path / "step-000000010").rename(tmp_path / "step-000000020")
    with pytest.raises(CheckpointDamagedError, match="is of step 10"):
        checkpoints.manifest(20)


def test_a_writable_volume_is_left_as_it_was(tmp_path: Path) -> None:
    store(tmp_path).check_writable(stage=2)
    assert listing(tmp_path) == []


def test_a_missing_volume_is_refused_with_a_cure(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"spec\.checkpoint\.volumeClaimName: .*No such file.*correct the claim"
    ):
        store(tmp_path / "missing").check_writable(stage=0)


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
