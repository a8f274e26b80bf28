"""The losses that every run of a job must have: those of one process that trains without a pipeline."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from pipelinejob_worker.protocol import WorkerConfig
from tests.e2e import kit
from tests.e2e.conftest import TEXT
from tests.unit.worker.reference import reference_losses


@cache
def undisturbed(steps: int) -> tuple[float, ...]:
    """Losses of ``kit.spec(steps=steps)``, computed in this process, once."""
    return of_one_process(kit.spec(steps=steps))


def of_one_process(spec: kit.Object, steps: int = 0) -> tuple[float, ...]:
    """Losses of a job on the tests' text: of its first ``steps`` steps, or of all."""
    with TemporaryDirectory() as directory:
        Path(directory, "text.txt").write_bytes(TEXT)
        train = spec["train"] | {"data": spec["train"]["data"] | {"files": [f"{directory}/*.txt"]}}
        config = WorkerConfig.model_validate({"job": "reference", "jobUid": "reference", **spec, "train": train})
        return tuple(reference_losses(config, steps or train["steps"], spec.get("pipelines", 1)))
