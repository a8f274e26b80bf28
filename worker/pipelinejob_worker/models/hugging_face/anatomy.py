"""Where a decoder can be cut: found by one forward pass on the meta device, without a table of architectures."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig, PreTrainedModel

from pipelinejob_worker.models.layered import Cost


class IndivisibleError(Exception):
    """The model cannot be cut into layers; the message says why."""


@dataclass(frozen=True)
class Anatomy:
    """The parts of a model: what runs before the list of layers, the layers, what runs after them."""

    architecture: type[PreTrainedModel]
    layers: str
    """Name of the list of layers in the base model."""

    count: int
    """Number of layers in the list."""

    before: frozenset[str]
    """Children of the base model that hold the embedding's parameters."""

    after: frozenset[str]
    """Children of the base model that hold the head's parameters, among them a tied embedding."""

    head: frozenset[str]
    """Children of the causal language model beside the base model."""

    returns_tuple: bool
    """Whether a layer returns its hidden state as the first of several values."""

    tie: tuple[str, str] | None
    """Names of the shared weight in the embedding and in the head, as ``named_parameters`` gives them."""

    costs: tuple[Cost, ...]
    """Of the embedding, each layer, the head."""

    takes_positions: bool
    """Whether the forward pass obeys ``position_ids``."""

    width: int
    vocabulary: int


def hidden_of(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> torch.Tensor:
    """Return the hidden state that a layer is called with: its first argument, by position or by name."""
    hidden: torch.Tensor = arguments[0] if arguments else keywords["hidden_states"]
    return hidden


def with_hidden(
    arguments: tuple[Any, ...], keywords: dict[str, Any], hidden: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a layer's arguments with another hidden state."""
    if arguments:
        return (hidden, *arguments[1:]), keywords
    return arguments, {**keywords, "hidden_states": hidden}


def first(output: Any) -> torch.Tensor:
    """Return the hidden state that a layer returned, alone or as the first of several values."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@contextmanager
def without_values(what: str) -> Iterator[None]:
    """Compute shapes and graphs only, on the meta device. Raises IndivisibleError when that fails.

    The tensors are fake ones and not only on meta, so that transformers builds masks without a look at their values.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("meta"):
        try:
            yield
        except IndivisibleError:
            raise
        except Exception as error:  # the code of any architecture may raise anything
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise IndivisibleError(f"{what} fails without values ({problem})") from error


def dissect(architecture: type[PreTrainedModel], config: PreTrainedConfig, tokens: int) -> Anatomy:
    """Find a model's parts, and prove on its autograd graph that one hidden state is all that passes between them.

    ``tokens``: length of the sample whose operations are counted. Raises IndivisibleError.
    """
    model = build_on_meta(architecture, config)
    base = model.base_model
    if base is model:
        raise IndivisibleError("the model is its own base model")
    name, layers = _layers(base, config.num_hidden_layers)
    if any(not parameter.requires_grad for parameter in model.parameters()):
        raise IndivisibleError("some of its parameters do not train")
    takes_positions = "position_ids" in inspect.signature(architecture.forward).parameters
    trace = _Trace(model, layers)
    trace.run(tokens, takes_positions=takes_positions)
    children = {child: _parameters(module) for child, module in base.named_children() if child != name}
    head = {child: _parameters(module) for child, module in model.named_children() if module is not base}
    before = frozenset(child for child, parameters in children.items() if parameters & trace.embedding)
    after = frozenset(child for child, parameters in children.items() if parameters & trace.head)
    known = trace.embedding | trace.head | _parameters(layers)
    if unused := [key for key, parameter in model.named_parameters() if parameter not in known]:
        raise IndivisibleError(f"parameter {unused[0]} takes no part in a forward pass")
    counts = [trace.embedding, *map(_parameters, layers), trace.head]
    return Anatomy(
        architecture=architecture,
        layers=name,
        count=len(layers),
        before=before,
        after=after,
        head=frozenset(head),
        returns_tuple=trace.returns_tuple,
        tie=_tie(model, trace.embedding & trace.head),
        costs=tuple(
            Cost(flops=flops / tokens, parameters=sum(parameter.numel() for parameter in parameters))
            for flops, parameters in zip(trace.flops, counts, strict=True)
        ),
        takes_positions=takes_positions,
        width=trace.width,
        vocabulary=trace.vocabulary,
    )


class _Trace:
    """One forward pass whose layers are cut apart: each gets its hidden state as a leaf of the autograd graph.

    What a layer's output depends on are then the leaves of its graph: its own parameters and that hidden state, or
    the model is refused. This finds a second hidden state, inputs of single layers, weights and keys that layers
    share, and skips over layers, however the code hands them on.
    """

    def __init__(self, model: PreTrainedModel, layers: nn.ModuleList) -> None:
        self._model = model
        self._layers = layers
        self._received: torch.Tensor | None = None
        self._counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: _grouped_flops})
        self._marks: list[int] = []
        self._calls = 0
        self.embedding: set[torch.Tensor] = set()
        self.head: set[torch.Tensor] = set()
        self.returns_tuple = False
        self.width = 0
        self.vocabulary = 0

    @property
    def flops(self) -> list[int]:
        """Operations of the embedding, each layer, the head."""
        marks = [0, *self._marks, self._counter.get_total_flops()]
        return [later - earlier for earlier, later in pairwise(marks)]

    def run(self, tokens: int, *, takes_positions: bool) -> None:
        """Run the pass over one sample. Raises IndivisibleError."""
        for index, layer in enumerate(self._layers):
            layer.register_forward_pre_hook(self._entering(index), with_kwargs=True)
            layer.register_forward_hook(self._leaving(index))
        with without_values("its forward pass"), self._counter:
            places = {"position_ids": torch.arange(tokens)[None]} if takes_positions else {}
            output = self._model(input_ids=torch.zeros(1, tokens, dtype=torch.int64), **places, use_cache=False)
        if self._calls != len(self._layers):
            raise IndivisibleError(f"only {self._calls} of its {len(self._layers)} layers are called")
        self.vocabulary = output.logits.shape[-1]
        self.head = _leaves(output.logits)
        if self._received not in self.head:
            raise IndivisibleError("its head does not read the last layer's hidden state")
        self.head.discard(self._received)
        if self.head & _parameters(self._layers):
            raise IndivisibleError("its head reads a layer's parameters")

    def _entering(self, index: int) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            if index != self._calls:
                raise IndivisibleError(f"layer {index} is called more than once or out of turn")
            hidden = hidden_of(arguments, keywords)
            if index == 0:
                if hidden.dim() != 3:
                    raise IndivisibleError(f"its hidden state has {hidden.dim()} dimensions")
                self.embedding, self.width = _leaves(hidden), hidden.shape[-1]
                self._marks.append(self._counter.get_total_flops())
            elif hidden is not self._received:
                raise IndivisibleError(f"layer {index} gets something else than layer {index - 1} returns")
            leaf = hidden if index else self._cut(hidden)
            return with_hidden(arguments, keywords, leaf)

        return hook

    def _leaving(self, index: int) -> Any:
        def hook(layer: nn.Module, _: tuple[Any, ...], output: Any) -> Any:
            self._marks.append(self._counter.get_total_flops())
            self._calls += 1
            self.returns_tuple = isinstance(output, tuple)
            foreign = _leaves(first(output)) - _parameters(layer) - {self._received}
            if foreign:
                raise IndivisibleError(
                    f"layer {index} reads more than its own parameters and one hidden state (per-layer inputs, shared "
                    "weights, or keys of another layer)"
                )
            leaf = self._cut(first(output))
            return (leaf, *output[1:]) if isinstance(output, tuple) else leaf

        return hook

    def _cut(self, hidden: torch.Tensor) -> torch.Tensor:
        self._received = hidden.detach().requires_grad_()
        return self._received


def _grouped_flops(left: torch.Size, *_: Any, out_shape: torch.Size, **__: Any) -> int:
    """Operations of the products of experts, which torch does not count; each row has one expert."""
    return 2 * left[-1] * out_shape.numel()


def _layers(base: nn.Module, count: int) -> tuple[str, nn.ModuleList]:
    lists = [
        (name, child)
        for name, child in base.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    if len(lists) != 1:
        nested = [
            name
            for name, module in base.named_modules()
            if "." in name and isinstance(module, nn.ModuleList) and len(module) == count
        ]
        found = f"{len(lists)} in its base model" + (f", and one deeper at {nested[0]}" if nested else "")
        raise IndivisibleError(f"of lists with all {count} layers there are {found}")
    return lists[0]


def _leaves(result: torch.Tensor) -> set[torch.Tensor]:
    """Return the tensors that autograd would give gradients to: what ``result`` is computed from."""
    return set(_walk(result))


def _walk(result: torch.Tensor) -> Iterator[torch.Tensor]:
    if result.grad_fn is None:
        if result.requires_grad:
            yield result
        return
    seen, waiting = set(), [result.grad_fn]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting += [source for source, _ in node.next_functions if source is not None]


def _parameters(module: nn.Module) -> set[torch.Tensor]:
    return set(module.parameters())


def _tie(model: PreTrainedModel, shared: set[torch.Tensor]) -> tuple[str, str] | None:
    if not shared:
        return None
    if len(shared) > 1:
        raise IndivisibleError(f"embedding and head share {len(shared)} weights")
    name = next(key for key, parameter in model.named_parameters() if parameter in shared)
    return name, name


def build_on_meta(architecture: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model without values, whose rotary embedding, which has no parameters, does not look at positions.

    Raises IndivisibleError.
    """
    try:
        plain = type(config).from_dict(config.to_dict())
        _set_default_rotation(getattr(plain, "rope_parameters", None))
        with torch.device("meta"):
            return architecture(plain)
    except Exception as error:  # checks of any architecture may raise anything
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise IndivisibleError(f"it cannot be built from its config.json ({problem})") from error


def _set_default_rotation(parameters: Any) -> None:
    if not isinstance(parameters, dict):
        return
    if "rope_type" in parameters:
        parameters["rope_type"] = "default"
    for value in parameters.values():
        _set_default_rotation(value)
