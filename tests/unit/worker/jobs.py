"""Small jobs to train."""

import json
from pathlib import Path
from typing import Any

from pipelinejob_worker.protocol import WorkerConfig

TEXT = "\n".join(
    f"{n} times {n + 1} is {n * (n + 1)}; its square is {(n * (n + 1)) ** 2}." for n in range(500)
).encode()


def job(
    directory: Path,
    steps: int = 12,
    schedule: str = "1F1B",
    dropout: str = "0",
    clip_norm: str = "1.0",
    every_steps: int = 5,
    **train: Any,
) -> WorkerConfig:
    """A GPT of six layers on a text that this writes into ``directory``."""
    (directory / "text.txt").write_bytes(TEXT)
    settings = {
        "data": {"files": [f"{directory}/*.txt"]},
        "steps": steps,
        "globalBatchSize": 8,
        "microbatches": 4,
        "schedule": {"name": schedule},
        "optimizer": {"learningRate": "3e-3", "clipNorm": clip_norm},
        "seed": 7,
    }
    return WorkerConfig.model_validate(
        {
            "job": "small",
            "jobUid": "1",
            "model": {
                "preset": {
                    "name": "gpt",
                    "layers": 4,
                    "width": 32,
                    "heads": 4,
                    "context": 16,
                    "dropout": dropout,
                }
            },
            "train": settings | train,
            "checkpoint": {"volumeClaimName": "state", "everySteps": every_steps, "keep": 2},
        }
    )


def history(checkpoints: Path) -> list[float]:
    """The losses that a run has left, which must be those of the steps from 1 on without a gap."""
    lines = [json.loads(line) for line in (checkpoints / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]
