"""The files of a model: a directory of the container or a repository of the hub."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pipelinejob_worker.errors import ConfigurationError

CONFIG = "config.json"
JSON_LIMIT_BYTES = 64 << 20
"""An index of a model with a million tensors has about this size."""


class Repository:
    """Files by name. From the hub only those that are asked for are fetched, all of the commit of the first."""

    def __init__(self, path: str, revision: str) -> None:
        self.path = path
        self._revision = revision
        self._local = path.startswith("/")

    def find(self, name: str) -> Path | None:
        """Return where the file is, or None if there is none. A hub that does not answer raises OSError.

        Raises ConfigurationError when the directory or repository cannot be read at all.
        """
        try:
            return self._in_directory(name) if self._local else self._on_hub(name)
        except PermissionError as error:
            raise self.refused(
                f"{error.filename} cannot be read: {error.strerror}; "
                "allowed: a directory that the worker's user may read; correct its mode or the pod's fsGroup"
            ) from error

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Return the object in a JSON file, or None if there is no such file. Raises ConfigurationError."""
        path = self.find(name)
        if path is None:
            return None
        try:
            with path.open("rb") as file:
                content = file.read(JSON_LIMIT_BYTES + 1)
        except OSError as error:
            raise self.refused(f"{path} cannot be read: {error.strerror}; allowed: a readable file") from error
        if len(content) > JSON_LIMIT_BYTES:
            raise self.refused(f"{path} is too large; allowed: {JSON_LIMIT_BYTES} bytes")
        try:
            value = json.loads(content)
        except ValueError as error:
            raise self.refused(f"{path} is not JSON ({error}); allowed: what save_pretrained writes") from error
        if not isinstance(value, dict):
            raise self.refused(f"{path} holds no object; allowed: what save_pretrained writes")
        return value

    def refused(self, problem: str) -> ConfigurationError:
        """Return the error that says what is wrong with this model."""
        return ConfigurationError(f"spec.model.huggingFace.path: {self.path}: {problem}")

    def _in_directory(self, name: str) -> Path | None:
        directory = Path(self.path)
        if not _exists(directory):
            raise self.refused("is not a directory in the worker container; mount its volume there or correct the path")
        path = directory / name
        return path if _exists(path) else None

    def _on_hub(self, name: str) -> Path | None:
        try:
            path = Path(hf_hub_download(self.path, name, revision=self._revision))
        except LocalEntryNotFoundError:  # no answer, which another attempt may get; also an EntryNotFoundError
            raise
        except EntryNotFoundError:
            return None
        except GatedRepoError as error:
            raise self.refused(
                "needs its owner's consent; give the container HF_TOKEN of an account that has it"
            ) from error
        except RevisionNotFoundError as error:
            raise self.refused(f"has no revision {self._revision}; allowed: a branch, tag or commit") from error
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise self.refused(
                "is no repository of the hub that this container may see; allowed: owner/name, or a directory "
                "with a leading /; a private one needs HF_TOKEN"
            ) from error
        self._revision = path.parent.name  # the commit: a branch that moves meanwhile must not mix two versions
        return path


def _exists(path: Path) -> bool:
    """Tell what is not there from what may not be seen, which ``Path.exists`` does not on every Python."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
