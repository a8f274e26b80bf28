"""Making the layers of a model attend to a paged cache, with the model's own code for all else."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.models import Chunk, LayeredModel
from pipelinejob_worker.models.gpt import Block, Gpt
from pipelinejob_worker.serve.attention import current_step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAGED = "pipelinejob_paged"
"""Name of our attention among those of the transformers library."""

_LAYER_KINDS = frozenset({"full_attention", "sliding_attention"})
_ROTATIONS_BY_LENGTH = frozenset({"dynamic", "longrope"})
_UNKNOWN = frozenset({"s_aux", "position_bias", "sinks", "head_mask"})


def use_paged_attention(model: LayeredModel, chunk: Chunk) -> None:
    """Make ``chunk`` read and write the cache of the current step.

    Raises ConfigurationError for a model whose attention is not known to need just its keys, a window and a bound.
    """
    if isinstance(model, Gpt):
        for index, layer in chunk.layers.items():
            if isinstance(layer, Block):
                _use_in_block(layer, index)
        return
    parts = list(_pretrained(chunk))
    if not parts:
        raise refused("spec.model.module", "its layers have no cache", "preset or huggingFace")
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: PLC0415 - imports for seconds

    ALL_ATTENTION_FUNCTIONS.register(PAGED, _attention_of_transformers)
    for part in parts:
        _check(part.config)
        # Also where masks are made: for an attention that it does not know the library makes none.
        part.config._attn_implementation = PAGED


def refused(path: str, problem: str, allowed: str) -> ConfigurationError:
    """Return the error for a model that can be trained but not served."""
    return ConfigurationError(f"{path}: this model cannot be served: {problem}; allowed: {allowed}")


def _pretrained(chunk: Chunk) -> Iterator["PreTrainedModel"]:
    from transformers import PreTrainedModel  # noqa: PLC0415 - imports for seconds

    return (module for module in chunk.modules() if isinstance(module, PreTrainedModel))


def _check(config: Any) -> None:
    path, allowed = "spec.model.huggingFace", "a decoder with full or sliding attention, for instance Llama or Qwen 3"
    if kinds := set(getattr(config, "layer_types", None) or ()) - _LAYER_KINDS:
        raise refused(path, f"it has layers of type {min(kinds)}", allowed)
    rotation = getattr(config, "rope_parameters", None) or {}
    for parameters in (rotation, *rotation.values()):
        if isinstance(parameters, dict) and parameters.get("rope_type") in _ROTATIONS_BY_LENGTH:
            kind = parameters["rope_type"]
            raise refused(
                path, f"its rotary embedding ({kind}) changes with the longest request of a batch", "another rope_type"
            )


def _attention_of_transformers(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as the library's own functions do, but to the cache; dropout is 0 as nothing trains."""
    used = sorted(name for name in _UNKNOWN & others.keys() if others[name] is not None)
    if attention_mask is not None or used:
        what = used[0] if used else "a mask of its own"
        raise refused("spec.model.huggingFace", f"its attention uses {what}", "plain or sliding attention")
    step = current_step()
    return step.attend(module.layer_idx, query, key, value, scale=scaling, window=sliding_window, softcap=softcap), None


def _use_in_block(block: Block, layer: int) -> None:
    def attend(hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        del mask
        split = block.query_key_value(hidden).unflatten(2, (3, block.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)
        result: torch.Tensor = block.attention_output(current_step().attend(layer, query, key, value).flatten(2))
        return result

    block._attend = attend  # type: ignore[method-assign]
