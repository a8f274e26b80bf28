"""Checkpoints on a volume that all stages share.

Layout under the volume's directory::

    step-000000120/              a complete checkpoint: 120 steps are done
        embedding.safetensors    one file per global layer, so that any number of stages can load it
        blocks.0.safetensors
        ...
        manifest.json            sizes and SHA-256 of all files, and whose checkpoint it is
    step-000000140.partial-3/    being written by attempt 3
    latest                       name of the newest complete checkpoint

A checkpoint is complete when its directory has its final name: the rename comes after all files are on the
volume. This module does no communication; ``commit`` lets the stages agree.
"""

import hashlib
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from pydantic import ValidationError

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.protocol.base import Wire
from pipelinejob_worker.state.files import replace, sync_directory, write_durably

MANIFEST = "manifest.json"
LATEST = "latest"
MANIFEST_LIMIT_BYTES = 1 << 20

_STEP = re.compile(r"step-(\d{9,12})")
_PARTIAL = re.compile(r"step-\d{9,12}\.partial-\d+")


class CheckpointDamagedError(Exception):
    """A checkpoint is not what its manifest says, or has none."""


class LayerFile(Wire):
    """One layer's file."""

    size: int
    sha256: str


class Manifest(Wire):
    """What a checkpoint holds and whose it is."""

    step: int
    fingerprint: str
    attempt: int
    layers: dict[str, LayerFile]


class CheckpointStore:
    """Checkpoints in one directory; ``fingerprint`` names model and seed, ``attempt`` this incarnation."""

    def __init__(self, directory: Path, fingerprint: str, attempt: int) -> None:
        self._directory = directory
        self._fingerprint = fingerprint
        self._attempt = attempt
        self._distrusted: set[int] = set()

    def check_writable(self, stage: int) -> None:
        """Raise ConfigurationError unless a file can be made here and reaches the volume."""
        probe = self._directory / f".probe-stage-{stage}"
        try:
            write_durably(probe, bytes(4096))
            probe.unlink()
        except OSError as error:
            raise ConfigurationError(
                f"spec.checkpoint.volumeClaimName: {self._directory} cannot be written: {error.strerror}; "
                "allowed: a mounted volume with free space that the worker's user may write; correct the "
                "claim, its access mode or the pod's fsGroup"
            ) from error

    def write_layer(self, step: int, name: str, tensors: Mapping[str, torch.Tensor]) -> LayerFile:
        """Write one layer into this attempt's partial checkpoint of ``step``. Raises OSError."""
        partial = self._partial(step)
        partial.mkdir(exist_ok=True)
        content = safetensors.torch.save({key: tensor.contiguous() for key, tensor in tensors.items()})
        write_durably(partial / _file_name(name), content)
        return LayerFile(size=len(content), sha256=hashlib.sha256(content).hexdigest())

    def publish(self, step: int, layers: Mapping[str, LayerFile]) -> None:
        """Turn the partial checkpoint, which all stages have written, into a complete one. Raises OSError.

        One stage does this. A crash at any point leaves the previous checkpoint as the newest complete one,
        or this.
        """
        partial, complete = self._partial(step), self._complete(step)
        manifest = Manifest(step=step, fingerprint=self._fingerprint, attempt=self._attempt, layers=dict(layers))
        write_durably(partial / MANIFEST, manifest.to_json().encode())
        sync_directory(partial)
        if complete.exists():  # only one that was not trusted on resume
            shutil.rmtree(complete)
        partial.rename(complete)
        self._distrusted.discard(step)
        sync_directory(self._directory)
        replace(self._directory / LATEST, f"{complete.name}\n".encode())

    def retain(self, keep: int) -> None:
        """Delete all but the newest ``keep`` checkpoints, and damaged or partial ones; raises OSError."""
        for step in (*self.complete_steps()[keep:], *self._distrusted):
            if self._complete(step).exists():
                shutil.rmtree(self._complete(step))
        self._distrusted.clear()
        self.discard_partial()

    def discard_partial(self) -> None:
        """Delete what was not finished, by whichever attempt; nobody may be writing. Raises OSError."""
        for path in self._directory.iterdir():
            if _PARTIAL.fullmatch(path.name):
                shutil.rmtree(path)

    def distrust(self, step: int) -> None:
        """Count a checkpoint as not there; ``retain`` deletes it once there is a good one."""
        self._distrusted.add(step)

    def complete_steps(self) -> list[int]:
        """Steps of the complete checkpoints, newest first, without distrusted ones."""
        names = (_STEP.fullmatch(path.name) for path in self._directory.iterdir())
        return sorted({int(name[1]) for name in names if name} - self._distrusted, reverse=True)

    def manifest(self, step: int) -> Manifest:
        """Read the manifest of a complete checkpoint.

        Raises CheckpointDamagedError when there is no valid one, and ConfigurationError when it is of another
        model or seed.
        """
        path = self._complete(step) / MANIFEST
        try:
            with path.open("rb") as file:
                manifest = Manifest.model_validate_json(file.read(MANIFEST_LIMIT_BYTES))
        except (OSError, ValidationError) as error:
            raise CheckpointDamagedError(f"{path}: {_one_line(error)}") from error
        if manifest.step != step:
            raise CheckpointDamagedError(f"{path}: is of step {manifest.step}")
        if manifest.fingerprint != self._fingerprint:
            raise ConfigurationError(
                f"spec.checkpoint.volumeClaimName: {self._complete(step)} is of '{manifest.fingerprint}', "
                f"this job is '{self._fingerprint}'; allowed: a checkpoint of the same model and seed; use "
                "another claim or empty this one"
            )
        return manifest

    def read_layer(
        self, manifest: Manifest, name: str, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, torch.Tensor]:
        """Read one layer of a complete checkpoint and verify its size, checksum, names and shapes.

        Raises CheckpointDamagedError.
        """
        path = self._complete(manifest.step) / _file_name(name)
        expected = manifest.layers.get(name)
        if expected is None:
            raise CheckpointDamagedError(f"{path}: layer {name} is not in the manifest")
        try:
            if path.stat().st_size != expected.size:
                raise CheckpointDamagedError(f"{path}: has {path.stat().st_size} bytes instead of {expected.size}")
            content = path.read_bytes()
        except OSError as error:
            raise CheckpointDamagedError(f"{path}: {_one_line(error)}") from error
        if hashlib.sha256(content).hexdigest() != expected.sha256:
            raise CheckpointDamagedError(f"{path}: the SHA-256 is not that of the manifest")
        try:
            tensors = safetensors.torch.load(content)
        except safetensors.SafetensorError as error:
            raise CheckpointDamagedError(f"{path}: {_one_line(error)}") from error
        if {key: tuple(tensor.shape) for key, tensor in tensors.items()} != dict(shapes):
            raise CheckpointDamagedError(f"{path}: tensors or shapes are not those of layer {name}")
        return tensors

    def _complete(self, step: int) -> Path:
        return self._directory / f"step-{step:09d}"

    def _partial(self, step: int) -> Path:
        return self._directory / f"step-{step:09d}.partial-{self._attempt}"


def _file_name(layer: str) -> str:
    return f"{layer}.safetensors"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
