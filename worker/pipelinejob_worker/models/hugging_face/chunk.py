"""Contiguous layers of a decoder: the original classes, without what other chunks hold."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from pipelinejob_worker.models.hugging_face.anatomy import (
    Anatomy,
    build_on_meta,
    first,
    hidden_of,
    with_hidden,
    without_values,
)
from pipelinejob_worker.models.hugging_face.repository import Repository
from pipelinejob_worker.models.hugging_face.weights import Weights
from pipelinejob_worker.models.layered import Chunk


@dataclass(frozen=True)
class Part:
    """What a pruned model keeps: all before the list of layers, some of the layers, or all after them."""

    kind: Literal["embedding", "layers", "head"]
    layers: range = range(0)


def parts_of(indices: range, count: int) -> list[Part]:
    """Return the parts that hold the layers ``indices`` of a model with ``count`` layers in its list.

    Layer 0 is the embedding, layer n + 1 the n-th of the list, and layer ``count + 1`` the head.
    """
    listed = range(max(indices.start, 1) - 1, min(indices.stop, count + 1) - 1)
    parts = [Part("embedding")] if 0 in indices else []
    if listed:
        parts.append(Part("layers", listed))
    if count + 1 in indices:
        parts.append(Part("head"))
    return parts


def layers_of(model: PreTrainedModel, part: Part, anatomy: Anatomy) -> dict[int, nn.Module]:
    """Return the modules of a part's layers by their indices."""
    if part.kind == "embedding":
        return {0: model}
    if part.kind == "head":
        return {anatomy.count + 1: model}
    modules = getattr(model.base_model, anatomy.layers)
    return {index + 1: modules[index] for index in part.layers}


class Absent(nn.Module):
    """Stands for a module that another part holds: hands on what it gets."""

    def __init__(self, *, returns_tuple: bool = False) -> None:
        super().__init__()
        self._returns_tuple = returns_tuple

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """Return the hidden state as it came, in the form of the module that is not here."""
        hidden = hidden_of(arguments, keywords)
        return (hidden, None) if self._returns_tuple else hidden


class AbsentEmbedding(nn.Module):
    """Stands for an embedding that another part holds: nothing to add."""

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """Return zero, which broadcasts."""
        return torch.zeros((), device=indices.device)


class Passage:
    """How a hidden state gets into a pruned model at its first layer, and out of it after its last.

    What the code before the first layer makes of the hidden state (it scales, adds positions, drops) is thrown away,
    as the embedding has done it; what it does after the last is left to the head.
    """

    def __init__(self) -> None:
        self._entering: torch.Tensor | None = None
        self._leaving: torch.Tensor | None = None

    def enter(self, layer: nn.Module) -> None:
        """Give ``layer`` what the part was called with."""

        def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            assert self._entering is not None
            return with_hidden(arguments, keywords, self._entering)

        layer.register_forward_pre_hook(hook, with_kwargs=True)

    def leave(self, layer: nn.Module) -> None:
        """Take what ``layer`` returns."""

        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            self._leaving = first(output)

        layer.register_forward_hook(hook)

    def open(self, hidden: torch.Tensor) -> None:
        """Begin a forward pass."""
        self._entering = hidden

    def left(self) -> torch.Tensor:
        """Return what left."""
        assert self._leaving is not None
        return self._leaving

    def close(self) -> None:
        """End a forward pass; keeps nothing alive."""
        self._entering = self._leaving = None


def pruned(anatomy: Anatomy, part: Part) -> type[PreTrainedModel]:
    """Return a subclass of the architecture whose instances hold one part, and whose ``forward(hidden, positions)``
    is that of a layer. It has the architecture's name, by which transformers finds the old names of its weights.
    """
    architecture: Any = anatomy.architecture

    def initialise(self: Any, config: PreTrainedConfig, *arguments: Any, **keywords: Any) -> None:
        architecture.__init__(self, config, *arguments, **keywords)
        self.passage = Passage()
        _prune(self, anatomy, part)

    def forward(self: Any, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        inputs: dict[str, Any] = {"input_ids" if part.kind == "embedding" else "inputs_embeds": hidden}
        if anatomy.takes_positions:
            inputs["position_ids"] = positions
        self.passage.open(hidden)
        try:
            if part.kind == "head":
                logits: torch.Tensor = architecture.forward(self, **inputs, use_cache=False).logits
                return logits
            self.base_model(**inputs, use_cache=False)
            left: torch.Tensor = self.passage.left()
            return left
        finally:
            self.passage.close()

    members: dict[str, Any] = {
        "__init__": initialise,
        "__module__": architecture.__module__,
        "__qualname__": architecture.__qualname__,
        "_keys_to_ignore_on_load_unexpected": [".*"],
        "forward": forward,
    }
    if part.kind != "head":
        members["_tied_weights_keys"] = None
    return type(architecture.__name__, (architecture,), members)


def check_parts(anatomy: Anatomy, config: PreTrainedConfig) -> None:
    """Raise IndivisibleError unless each part runs without the others: the code may read what is absent."""
    for part in parts_of(range(anatomy.count + 2), anatomy.count):
        model = build_on_meta(pruned(anatomy, part), config)
        with without_values(f"its {part.kind} alone"):
            tokens = torch.zeros(1, 2, dtype=torch.int64)
            model(tokens if part.kind == "embedding" else torch.zeros(1, 2, anatomy.width), torch.arange(2)[None])


def load(anatomy: Anatomy, part: Part, config: PreTrainedConfig, repository: Repository) -> PreTrainedModel:
    """Build one part on the meta device and read its tensors, as float32, and no others.

    Raises ConfigurationError when one is missing, has another shape or cannot be read: transformers alone would
    initialise it at random.
    """
    model_class: Any = pruned(anatomy, part)
    model: PreTrainedModel
    with Weights(repository) as weights, silence():
        try:
            model, found = model_class.from_pretrained(
                None,
                config=config,
                state_dict=weights.tensors(),
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except Exception as error:  # whatever transformers makes of a failed read or conversion
            problem = " ".join(str(error).split())[:300]
            raise weights.failure or repository.refused(
                f"its weights do not fit config.json ({problem}); both must be of one model: copy it anew"
            ) from error
        if weights.failure:
            raise weights.failure
    _check(model, found, anatomy, part, repository)
    model.train()
    return model


class HuggingFaceChunk(Chunk):
    """Some layers of a decoder, in up to three parts that are called one after another.

    ``layers`` maps 0 to the part before the list of layers, the last index to the part after it, both whole pruned
    models, and the indices between to the modules of the list, which the code of the architecture calls. So masks and
    rotary embeddings are computed once for all layers between, and the ``forward`` of each is called once.
    """

    def __init__(self, anatomy: Anatomy, indices: range, config: PreTrainedConfig, repository: Repository) -> None:
        """Read the layers ``indices``. Raises ConfigurationError."""
        super().__init__()
        layers: dict[int, nn.Module] = {}
        self._parts = nn.ModuleList()
        for part in parts_of(indices, anatomy.count):
            model = load(anatomy, part, config, repository)
            self._parts.append(model)
            layers |= layers_of(model, part, anatomy)
        self.layers = layers

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Pass one microbatch through the layers."""
        for part in self._parts:
            hidden = part(hidden, positions)
        return hidden


def _prune(model: Any, anatomy: Anatomy, part: Part) -> None:
    base, passage = model.base_model, model.passage
    layers = getattr(base, anatomy.layers)
    for index in range(anatomy.count):
        if index not in part.layers:
            layers[index] = Absent(returns_tuple=anatomy.returns_tuple)
    kept = {"embedding": anatomy.before, "layers": frozenset[str](), "head": anatomy.after}[part.kind]
    for name in (anatomy.before | anatomy.after) - kept:
        embedding = isinstance(getattr(base, name), nn.Embedding)
        setattr(base, name, AbsentEmbedding() if embedding else Absent())
    if part.kind != "head":
        for name in anatomy.head:
            setattr(model, name, Absent())
        model.all_tied_weights_keys = {}
    if part.kind == "embedding":
        passage.leave(layers[0])
    elif part.kind == "head":
        passage.enter(layers[-1])
    else:
        passage.enter(layers[part.layers.start])
        passage.leave(layers[part.layers.stop - 1])


def _check(model: PreTrainedModel, found: Any, anatomy: Anatomy, part: Part, repository: Repository) -> None:
    if missing := sorted(found["missing_keys"]):
        raise repository.refused(f"tensor {missing[0]} is in none of its files ({len(missing)} missing); copy it anew")
    if mismatched := sorted(found["mismatched_keys"]):
        name, stored, wanted = mismatched[0]
        raise repository.refused(
            f"tensor {name} has shape {list(stored)} instead of {list(wanted)}; config.json and the files must be of "
            "one model: copy it anew"
        )
    if part.kind == "head" and anatomy.tie and _holds_two_vocabularies(model):
        raise repository.refused(
            "config.json ties the head to the embedding, but the files hold two different weights; set "
            "tie_word_embeddings to false there"
        )


def _holds_two_vocabularies(model: Any) -> bool:
    return model.get_output_embeddings().weight is not model.get_input_embeddings().weight


@contextmanager
def silence() -> Iterator[None]:
    """No progress bar in the log, and no table of what is missing: that is an error here."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
