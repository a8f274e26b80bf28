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
    chunks: int = 1,
    layers: int = 4,
    context: int = 16,
    tied: bool = False,
    data: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    partition: str = "Balanced",
    **train: Any,
) -> WorkerConfig:
    """A GPT of ``layers`` blocks, embedding and head on a text that this writes into ``directory``."""
    (directory / "text.txt").write_bytes(TEXT)
    settings = {
        "data": {"files": [f"{directory}/*.txt"]} | (data or {}),
        "steps": steps,
        "globalBatchSize": 8,
        "microbatches": 4,
        "schedule": {"name": schedule, "chunksPerStage": chunks},
        "optimizer": {"learningRate": "3e-3", "clipNorm": clip_norm} | (optimizer or {}),
        "seed": 7,
    }
    return WorkerConfig.model_validate(
        {
            "job": "small",
            "jobUid": "1",
            "model": {
                "preset": {
                    "name": "gpt",
                    "layers": layers,
                    "width": 32,
                    "heads": 4,
                    "context": context,
                    "dropout": dropout,
                    "tieEmbeddings": tied,
                }
            },
            "train": settings | train,
            "partition": {"strategy": partition},
            "checkpoint": {"volumeClaimName": "state", "everySteps": every_steps, "keep": 2},
        }
    )


def history(checkpoints: Path) -> list[float]:
    """The losses that a run has left, which must be those of the steps from 1 on without a gap."""
    lines = [json.loads(line) for line in (checkpoints / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]
