"""The weights of another job's checkpoint in a model's layers."""

from collections.abc import Mapping
from pathlib import Path

import torch

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.models import Chunk, LayeredModel
from pipelinejob_worker.state.checkpoint import CheckpointDamagedError, CheckpointStore, read_layer, read_manifest

WEIGHT = "weight."
"""What the names of weights begin with in a checkpoint; other tensors are the optimizer's."""

STEPS_OFFERED = 64


class Trained:
    """The complete checkpoints of a job, read only; ``fingerprint`` names the model and seed that they must be of."""

    def __init__(self, directory: Path, fingerprint: str, job: str) -> None:
        self._directory = directory
        self._fingerprint = fingerprint
        self._job = job
        self._store = CheckpointStore(directory, fingerprint, attempt=0)

    def steps(self) -> list[int]:
        """Steps of the newest complete checkpoints, newest first. Raises ConfigurationError when there is none."""
        try:
            found = self._store.complete_steps()[:STEPS_OFFERED]
        except OSError as error:
            raise self._refused(f"{self._directory} cannot be read: {error.strerror}") from error
        if not found:
            raise self._refused("it has no complete checkpoint yet")
        return found

    def fill(self, model: LayeredModel, chunk: Chunk, step: int) -> None:
        """Replace the weights of a chunk's layers by those after ``step`` steps.

        Raises ConfigurationError, also when the checkpoint is damaged.
        """
        directory = self._directory / f"step-{step:09d}"
        try:
            manifest = read_manifest(directory)
            if manifest.fingerprint != self._fingerprint:
                raise self._refused(f"its checkpoint is of '{manifest.fingerprint}', not of '{self._fingerprint}'")
            for index, layer in chunk.layers.items():
                name = model.names[index]
                state = read_layer(directory, manifest, name)
                weights = {key.removeprefix(WEIGHT): state[key] for key in state if key.startswith(WEIGHT)}
                self._copy(name, dict(layer.named_parameters()), weights)
        except CheckpointDamagedError as error:
            raise self._refused(f"its checkpoint of step {step} is damaged: {error}") from error

    def _copy(self, name: str, parameters: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> None:
        for key in sorted(parameters.keys() | weights.keys()):
            wanted, found = (tuple(of[key].shape) if key in of else "none" for of in (parameters, weights))
            if wanted != found:
                raise self._refused(f"weight {key} of layer {name} has shape {found} instead of {wanted}")
        with torch.no_grad():
            for key, parameter in parameters.items():
                parameter.copy_(weights[key])

    def _refused(self, problem: str) -> ConfigurationError:
        return ConfigurationError(
            f"spec.model.fromJob: '{self._job}' cannot be served: {problem}; allowed: a job with a complete checkpoint "
            "on its claim; let it train on, or name another step"
        )
