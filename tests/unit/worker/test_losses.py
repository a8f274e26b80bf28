"""The proof of the pipeline: its losses are those of one process, bit by bit, however the model is cut."""

from pathlib import Path
from typing import Any

import pytest

from pipelinejob_worker.link import Reached
from tests.unit.worker.forked import pipeline, run_to_end
from tests.unit.worker.jobs import history, job
from tests.unit.worker.pairs import all_pairs
from tests.unit.worker.reference import reference_losses

STEPS = 20
SCHEDULES = (
    ("GPipe", 1),
    ("1F1B", 1),
    ("LoopedBFS", 2),
    ("Interleaved1F1B", 2),
    ("InterleavedZeroBubble", 1),
    ("InterleavedZeroBubble", 2),
    ("ZBVZeroBubble", 2),
    ("DualPipeV", 2),
)
SETTINGS: dict[str, tuple[Any, ...]] = {
    "schedule": SCHEDULES,
    "stages": (2, 4),
    "pipelines": (1, 2),
    "dropout": ("0", "0.1"),
    "tied": (False, True),
    "clip_norm": ("0", "0.5"),
    "optimizer": ("AdamW", "SGD"),
    "decay": ("Constant", "Linear"),
    "packing": ("Stream", "Documents"),
    "precision": ("Float32", "BFloat16"),
    "checkpointing": (False, True),
}


def losses_of(directory: Path, config: Any, stages: int, pipelines: int = 1) -> list[float]:
    checkpoints = directory / f"{stages}x{pipelines}"
    checkpoints.mkdir()
    assert run_to_end(config, stages, checkpoints, checkpoints, pipelines=pipelines) == [0] * stages * pipelines
    return history(checkpoints)


@pytest.mark.parametrize("chosen", all_pairs(SETTINGS), ids=lambda row: "-".join(str(value) for value in row.values()))
def test_every_schedule_and_setting_has_the_losses_of_one_process(tmp_path: Path, chosen: dict[str, Any]) -> None:
    (name, chunks), stages, pipelines = chosen["schedule"], chosen["stages"], chosen["pipelines"]
    microbatches = stages * pipelines * (2 if name == "DualPipeV" else 1)
    config = job(
        tmp_path,
        steps=STEPS,
        schedule=name,
        chunks=chunks,
        layers=6,
        dropout=chosen["dropout"],
        tied=chosen["tied"],
        clip_norm=chosen["clip_norm"],
        every_steps=100,
        data={"packing": chosen["packing"]},
        optimizer={"name": chosen["optimizer"], "decay": chosen["decay"], "warmupSteps": 3, "learningRate": "1e-2"},
        precision=chosen["precision"],
        activationCheckpointing=chosen["checkpointing"],
        microbatches=microbatches,
        globalBatchSize=2 * microbatches,
    )
    expected = reference_losses(config, STEPS, pipelines)
    assert expected[-1] < expected[0]
    assert losses_of(tmp_path, config, stages, pipelines) == expected


def test_float16_scales_the_loss_and_skips_steps_that_overflow(tmp_path: Path) -> None:
    fast = {"learningRate": "1e-2"}
    config = job(tmp_path, steps=STEPS, clip_norm="0", microbatches=2, precision="Float16", optimizer=fast)
    with pipeline(config, 2, tmp_path, tmp_path) as stages:
        told = [event.progress for event in stages[0].events() if isinstance(event, Reached)]
        assert [stage.exit_code() for stage in stages] == [0, 0]
    assert told[-1].skipped_steps >= 1, "the first scale is too large for this model"
    assert history(tmp_path) == reference_losses(config, STEPS)


def test_compiled_layers_have_the_losses_of_one_process_with_compiled_layers(tmp_path: Path) -> None:
    config = job(tmp_path, steps=3, dropout="0.1", layers=2, compile=True)
    assert losses_of(tmp_path, config, 2) == reference_losses(config, 3)


@pytest.mark.parametrize("schedule", ["GPipe", "1F1B"])
def test_every_number_of_stages_has_the_same_losses(tmp_path: Path, schedule: str) -> None:
    config = job(tmp_path, schedule=schedule, dropout="0.1", clip_norm="0.5", every_steps=100)
    expected = reference_losses(config, 12)
    for stages in (1, 2, 3, 4):
        assert losses_of(tmp_path, config, stages) == expected, f"{stages} stages"
