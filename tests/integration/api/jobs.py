"""Jobs to send to an API server."""

import copy
from typing import Any

GOOD: dict[str, Any] = {
    "apiVersion": "pipelinejob.dev/v1alpha1",
    "kind": "PipelineJob",
    "metadata": {"name": "tiny", "namespace": "default"},
    "spec": {
        "stages": 4,
        "model": {"preset": {"name": "gpt", "layers": 8, "width": 256, "heads": 8, "context": 256}},
        "train": {"data": {"files": ["/data/*.txt"]}, "steps": 200, "globalBatchSize": 32, "microbatches": 8},
    },
}


def job(**changes: Any) -> dict[str, Any]:
    """A good job with some values changed; keys are paths such as spec__train__microbatches."""
    made = copy.deepcopy(GOOD)
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = made
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return made


def worker(**container: Any) -> dict[str, Any]:
    """A template that sets members of the container worker."""
    return {"spec": {"containers": [{"name": "worker", **container}]}}


def schedule(name: str, chunks: int = 1) -> dict[str, Any]:
    """Changes that choose a schedule."""
    return {"spec__train__schedule": {"name": name, "chunksPerStage": chunks}}


def steps(microbatches: int) -> dict[str, Any]:
    """Changes that cut a step into microbatches of one sample."""
    return {"spec__train__microbatches": microbatches, "spec__train__globalBatchSize": microbatches}


def manual(*boundaries: int) -> dict[str, Any]:
    """Changes that cut the model by hand."""
    return {"spec__partition": {"strategy": "Manual", "boundaries": list(boundaries)}}


def hugging_face(path: str) -> dict[str, Any]:
    """Changes that take the model from a directory or a hub."""
    return {"spec__model": {"huggingFace": {"path": path, "context": 256}}}
