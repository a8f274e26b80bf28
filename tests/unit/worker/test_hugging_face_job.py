"""A job of a decoder has the same losses for any stages and schedule, and its checkpoint loads in transformers."""

import shutil
from pathlib import Path

import torch
from transformers import GPT2Config

from pipelinejob_worker.models.hugging_face.export import main
from pipelinejob_worker.protocol import Model, WorkerConfig
from tests.unit.worker import forked
from tests.unit.worker.decoders import CONFIGS, CONTEXT, save, whole_of
from tests.unit.worker.jobs import history, job

STEPS = 4


def run(directory: Path, model: Path, schedule: str, *, stages: int, chunks: int) -> Path:
    """Train on documents of bytes; return the directory of checkpoints."""
    checkpoints = directory / "checkpoints"
    checkpoints.mkdir(parents=True)
    config = job(
        directory, steps=STEPS, schedule=schedule, chunks=chunks, every_steps=STEPS, data={"packing": "Documents"}
    )
    source = Model.model_validate({"huggingFace": {"path": str(model), "context": CONTEXT}})
    config = WorkerConfig.model_validate(config.model_copy(update={"model": source}).model_dump())
    assert forked.run_to_end(config, stages, directory, checkpoints) == [0] * stages
    return checkpoints


def test_a_tied_decoder_with_dropout_trains_the_same_for_any_schedule_and_is_exported(tmp_path: Path) -> None:
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.1)
    model = tmp_path / "model"
    save(GPT2Config(**{**CONFIGS["GPT-2"].to_dict(), **dropout, "vocab_size": 256}), model)
    alone = run(tmp_path / "alone", model, "1F1B", stages=1, chunks=1)
    split = run(tmp_path / "split", model, "ZBVZeroBubble", stages=2, chunks=2)
    losses = history(alone)
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    assert history(split) == losses

    def exported(checkpoints: Path) -> dict[str, torch.Tensor]:
        step = checkpoints / f"step-{STEPS:09d}"
        shutil.rmtree(tmp_path / "exported", ignore_errors=True)
        assert main(["--checkpoint", str(step), "--model", str(model), "--output", str(tmp_path / "exported")]) == 0
        return dict(whole_of(tmp_path / "exported").state_dict())

    one, other, before = exported(alone), exported(split), whole_of(model).state_dict()
    assert one.keys() == other.keys() == before.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert not any(torch.equal(one[key], before[key]) for key in one)
