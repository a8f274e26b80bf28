"""Reading single tensors of a model's safetensors files, each when it is needed."""

import threading
from types import EllipsisType, TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pipelinejob_worker.models.hugging_face.repository import Repository

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class LazyTensor:
    """A tensor that is read on ``tensor[...]``, as transformers does for the names that a model has."""

    def __init__(self, weights: "Weights", name: str) -> None:
        self._weights = weights
        self._name = name

    def __getitem__(self, _everything: EllipsisType) -> torch.Tensor:
        return self._weights.read(self._name)


class Weights:
    """The tensors of a model by their names in the files; a context that closes the files.

    They are read with pread and not mapped, so that a file that is damaged later cannot end the process, and so
    that only the bytes of own tensors are requested. Only files with own tensors are opened, or fetched.
    """

    def __init__(self, repository: Repository) -> None:
        """Raise ConfigurationError when there are no safetensors files."""
        self._repository = repository
        self._open: dict[str, Any] = {}
        self._lock = threading.Lock()
        self.failure: Exception | None = None
        if repository.find(SINGLE):
            self._files = dict.fromkeys(self._file(SINGLE).keys(), SINGLE)
        else:
            self._files = self._read_index()

    def __enter__(self) -> "Weights":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._open.values():
            file.__exit__(None, None, None)
        self._open.clear()

    def tensors(self) -> dict[str, LazyTensor]:
        """Return all tensors by name; none is read yet."""
        return {name: LazyTensor(self, name) for name in self._files}

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor, from any thread.

        Raises ConfigurationError, and OSError when a hub does not answer; keeps the first in ``failure``, as
        transformers makes something else of it.
        """
        try:
            return self._read(self._file(self._files[name]), name)
        except Exception as error:
            self.failure = self.failure or error
            raise

    def _read(self, file: Any, name: str) -> torch.Tensor:
        try:
            tensor: torch.Tensor = file.get_slice(name)[...]
        except (OSError, SafetensorError) as error:
            raise self._repository.refused(
                f"{self._files[name]}: tensor {name} cannot be read ({_one_line(error)}); copy the model anew"
            ) from error
        return tensor

    def _file(self, name: str) -> Any:
        with self._lock:
            if name not in self._open:
                path = self._repository.find(name)
                if path is None:
                    raise self._repository.refused(f"has no file {name}, which {INDEX} names; copy the model anew")
                try:
                    self._open[name] = safe_open(path, framework="pt", backend="pread")
                except (OSError, SafetensorError) as error:
                    raise self._repository.refused(
                        f"{name} is truncated or no safetensors file ({_one_line(error)}); copy the model anew"
                    ) from error
            return self._open[name]

    def _read_index(self) -> dict[str, str]:
        index = self._repository.read_json(INDEX)
        if index is None:
            raise self._repository.refused(
                f"has neither {SINGLE} nor {INDEX}; allowed: safetensors files, because others (pytorch_model.bin) are "
                "pickled and can run code; convert with from_pretrained and save_pretrained"
            )
        files = index.get("weight_map")
        if not isinstance(files, dict) or not all(_is_file_name(file) for file in files.values()):
            raise self._repository.refused(f"{INDEX} has no weight_map from tensors to files; copy the model anew")
        return files


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and "/" not in value and value.endswith(".safetensors")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
