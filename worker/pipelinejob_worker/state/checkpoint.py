"""Checkpoints on a volume that all stages share.

Layout under the volume's directory::

    step-000000120/                  a complete checkpoint: 120 steps are done
        embedding.safetensors        one file per global layer, so that any number of stages can load it
        blocks.0.safetensors
        ...
        manifest.json                sizes and SHA-256 of all files, and whose checkpoint it is
    step-000000140.partial-3/        being written by attempt 3
        embedding.part-0.safetensors with several pipelines, the optimizer state of a layer is spread over them:
        embedding.part-1.safetensors each writes its share, and a layer is the union of its parts
        written-0.json               what rank 0 has written; the manifest is made of these
        ...
    step-000000080.deleted-3/        being deleted
    latest                           name of the newest complete checkpoint

Within the files a tensor's name begins with its layer's, so it is unique in the whole checkpoint:
``blocks.0.weight.mlp.bias``. So ``torch.distributed.checkpoint`` reads one, at any sharding, with its
HuggingFaceStorageReader. It does not write them: its planners exchange pickled objects, and it knows no checksums.

A checkpoint is complete when its directory has its final name: the rename comes after all files are on the
volume. This module does no communication; ``commit`` lets the ranks agree.
"""

import hashlib
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, TypeVar
from urllib.parse import quote

import safetensors
import safetensors.torch
import torch
from pydantic import Field, ValidationError

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.protocol.base import Wire
from pipelinejob_worker.state.files import replace, sync_directory, write_durably

MANIFEST = "manifest.json"
LATEST = "latest"
MANIFEST_LIMIT_BYTES = 1 << 26

Read = TypeVar("Read", bound=Wire)

_STEP = re.compile(r"step-(\d{9,12})")
_UNFINISHED = re.compile(r"step-\d{9,12}\.(partial|deleted)-\d+")


class CheckpointDamagedError(Exception):
    """A checkpoint is not what its manifest says, or has none."""


class LayerFile(Wire):
    """One file of a layer."""

    size: int
    sha256: str


class Written(Wire):
    """What one rank has written: its part of each of its layers."""

    part: int
    layers: dict[str, LayerFile]


Files = LayerFile | tuple[LayerFile, ...]
"""Of one layer, by part. A single one stands for itself: so workers that know no parts read what has none."""

Number = int | Annotated[float, Field(allow_inf_nan=False)]


class Manifest(Wire):
    """What a checkpoint holds and whose it is. ``extra`` is what training must know beside the layers."""

    step: int
    fingerprint: str
    attempt: int
    layers: dict[str, Files]
    extra: dict[str, Number] = Field(default_factory=dict)


class CheckpointStore:
    """Checkpoints in one directory; ``fingerprint`` names model and seed, ``attempt`` this incarnation."""

    def __init__(self, directory: Path, fingerprint: str, attempt: int) -> None:
        self._directory = directory
        self._fingerprint = fingerprint
        self._attempt = attempt
        self._distrusted: set[int] = set()

    def check_writable(self, rank: int) -> None:
        """Raise ConfigurationError unless a file can be made here and reaches the volume."""
        probe = self._directory / f".probe-rank-{rank}"
        try:
            write_durably(probe, bytes(4096))
            probe.unlink()
        except OSError as error:
            raise ConfigurationError(
                f"spec.checkpoint.volumeClaimName: {self._directory} cannot be written: {error.strerror}; "
                "allowed: a mounted volume with free space that the worker's user may write; correct the "
                "claim, its access mode or the pod's fsGroup"
            ) from error

    def write_layer(
        self, step: int, name: str, content: bytes | memoryview, *, part: int = 0, parts: int = 1
    ) -> LayerFile:
        """Write one part of a layer, in safetensors format, into this attempt's checkpoint of ``step``.

        The parts of a layer have different tensors. Raises OSError.
        """
        partial = self._partial(step)
        partial.mkdir(exist_ok=True)
        write_durably(partial / _file_name(name, part, parts), content)
        return LayerFile(size=len(content), sha256=hashlib.sha256(content).hexdigest())

    def write_list(self, step: int, rank: int, written: Written) -> None:
        """Say for ``publish`` what ``rank`` has written, after it has written it. Raises OSError."""
        write_durably(self._partial(step) / _list_name(rank), written.to_json().encode())

    def publish(
        self, step: int, names: Sequence[str], *, ranks: int, parts: int = 1, extra: Mapping[str, int | float]
    ) -> None:
        """Turn the partial checkpoint, which all ranks have written, into a complete one.

        One rank does this. A crash at any point leaves the previous checkpoint as the newest complete one, or
        this. Raises OSError, and CheckpointDamagedError when what the ranks have written is not all there.
        """
        partial, complete = self._partial(step), self._complete(step)
        lists = [partial / _list_name(rank) for rank in range(ranks)]
        manifest = Manifest(
            step=step,
            fingerprint=self._fingerprint,
            attempt=self._attempt,
            layers=_merged([_read_json(path, Written) for path in lists], names, parts),
            extra=dict(extra),
        )
        write_durably(partial / MANIFEST, manifest.to_json().encode())
        for path in lists:
            path.unlink()
        sync_directory(partial)
        if complete.exists():  # one that was not trusted, or the same one from an attempt that ended late
            complete.rename(self._deleted(step))
        partial.rename(complete)
        self._distrusted.discard(step)
        sync_directory(self._directory)
        replace(self._directory / LATEST, f"{complete.name}\n".encode())

    def retain(self, keep: int) -> None:
        """Delete all but the newest ``keep`` checkpoints, and damaged or unfinished ones; raises OSError."""
        for step in (*self.complete_steps()[keep:], *self._distrusted):
            if self._complete(step).exists():
                self._complete(step).rename(self._deleted(step))  # half of it must not look complete
        self._distrusted.clear()
        self.discard_unfinished()

    def discard_unfinished(self) -> None:
        """Delete what is not finished, by whichever attempt; nobody may be writing. Raises OSError."""
        for path in self._directory.iterdir():
            if _UNFINISHED.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

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
        manifest = read_manifest(self._complete(step))
        if manifest.step != step:
            raise CheckpointDamagedError(f"{self._complete(step) / MANIFEST}: is of step {manifest.step}")
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
        """Read one layer of a complete checkpoint, all its parts, and verify sizes, checksums, names and shapes.

        Raises CheckpointDamagedError when a file is not as it was written, and ConfigurationError when it is but
        has other tensors than ``shapes``: then it is of another job, and not to be deleted as damaged.
        """
        directory = self._complete(manifest.step)
        tensors = read_layer(directory, manifest, name)
        found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        for key in sorted(found.keys() | shapes.keys()):
            if found.get(key) != shapes.get(key):
                raise ConfigurationError(
                    f"spec.checkpoint.volumeClaimName: {directory} has for layer {name} the tensor {key} with shape "
                    f"{found.get(key, 'none')}, this job has {shapes.get(key, 'none')}; allowed: a checkpoint of the "
                    "same model and optimizer; use another claim or empty this one"
                )
        return tensors

    def _complete(self, step: int) -> Path:
        return self._directory / f"step-{step:09d}"

    def _partial(self, step: int) -> Path:
        return self._directory / f"step-{step:09d}.partial-{self._attempt}"

    def _deleted(self, step: int) -> Path:
        return self._directory / f"step-{step:09d}.deleted-{self._attempt}"


def global_names(layer: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name a layer's tensors as they are in its file."""
    return {f"{layer}.{key}": tensor for key, tensor in tensors.items()}


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of the complete checkpoint in ``directory``. Raises CheckpointDamagedError."""
    return _read_json(directory / MANIFEST, Manifest)


def read_layer(directory: Path, manifest: Manifest, name: str) -> dict[str, torch.Tensor]:
    """Read all parts of a layer of the checkpoint in ``directory``, and verify their sizes and checksums.

    Raises CheckpointDamagedError.
    """
    files = manifest.layers.get(name, ())
    if not files:
        raise CheckpointDamagedError(f"{directory / MANIFEST}: layer {name} is not in it")
    if isinstance(files, LayerFile):
        files = (files,)
    tensors: dict[str, torch.Tensor] = {}
    for part, file in enumerate(files):
        path = directory / _file_name(name, part, len(files))
        read = _local_names(name, _read_file(path, file))
        if twice := sorted(read.keys() & tensors.keys()):
            raise CheckpointDamagedError(f"{path}: tensor {twice[0]} is in another part of the layer, too")
        tensors |= read
    return tensors


def _local_names(layer: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Undo ``global_names``; workers before protocol 4 wrote a layer's own names."""
    prefix = f"{layer}."
    if not all(key.startswith(prefix) for key in tensors):
        return tensors
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}


def _merged(written: Sequence[Written], names: Sequence[str], parts: int) -> dict[str, Files]:
    """Return the files of each layer in the order of their parts. Raises CheckpointDamagedError if any is missing."""
    files = {(name, rank.part): file for rank in written for name, file in rank.layers.items()}
    missing = [(name, part) for name in names for part in range(parts) if (name, part) not in files]
    if missing:
        raise CheckpointDamagedError("no rank has written part {0[1]} of layer {0[0]}".format(missing[0]))
    if parts == 1:
        return {name: files[name, 0] for name in names}
    return {name: tuple(files[name, part] for part in range(parts)) for name in names}


def _read_json(path: Path, kind: type[Read]) -> Read:
    try:
        with path.open("rb") as file:
            return kind.model_validate_json(file.read(MANIFEST_LIMIT_BYTES))
    except (OSError, ValidationError) as error:
        raise CheckpointDamagedError(f"{path}: {_one_line(error)}") from error


def _read_file(path: Path, expected: LayerFile) -> dict[str, torch.Tensor]:
    """Read one part of a layer. Raises CheckpointDamagedError when it is not as ``expected``."""
    try:
        if path.stat().st_size != expected.size:
            raise CheckpointDamagedError(f"{path}: has {path.stat().st_size} bytes instead of {expected.size}")
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointDamagedError(f"{path}: {_one_line(error)}") from error
    if hashlib.sha256(content).hexdigest() != expected.sha256:
        raise CheckpointDamagedError(f"{path}: the SHA-256 is not that of the manifest")
    try:
        return safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise CheckpointDamagedError(f"{path}: {_one_line(error)}") from error


def _file_name(layer: str, part: int, parts: int) -> str:
    """Name of a file in the checkpoint's directory, whatever the user's model calls its layers."""
    return f"{quote(layer, safe='')}.{f'part-{part}.' if parts > 1 else ''}safetensors"


def _list_name(rank: int) -> str:
    return f"written-{rank}.json"


def _one_line(error: Exception) -> str:
    """What went wrong, for a message that already names the file."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return f"{first['msg']} at {'.'.join(map(str, first['loc']))}" if first["loc"] else first["msg"]
    return " ".join(str(error).split())
