"""Small decoders of the transformers library with random weights, as files and as what a split must reproduce."""

import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from pipelinejob_worker.models import LayeredModel
from pipelinejob_worker.models.hugging_face import HuggingFaceModel
from pipelinejob_worker.protocol import HuggingFace

VOCABULARY, CONTEXT, BLOCKS = 96, 16, 5

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}
MODERN = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **SPECIAL,
}
WINDOW = {"sliding_window": 4}

CONFIGS: dict[str, PreTrainedConfig] = {
    "Llama": LlamaConfig(**MODERN),
    "Llama tied": LlamaConfig(**MODERN, tie_word_embeddings=True),
    "Qwen 2": Qwen2Config(**MODERN, **WINDOW, use_sliding_window=True, max_window_layers=2),
    "Qwen 3": Qwen3Config(**MODERN, head_dim=8, tie_word_embeddings=True),
    "Mistral": MistralConfig(**MODERN, **WINDOW),
    "Gemma": GemmaConfig(**MODERN, head_dim=8),
    "Gemma 2": Gemma2Config(**MODERN, **WINDOW, head_dim=8),
    "Gemma 3": Gemma3TextConfig(**MODERN, **WINDOW, head_dim=8, final_logit_softcapping=2.0),
    "GPT-2": GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=BLOCKS,
        n_head=4,
        n_positions=64,
        scale_attn_by_inverse_layer_idx=True,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **SPECIAL,
    ),
    "GPT-NeoX": GPTNeoXConfig(**{key: value for key, value in MODERN.items() if key != "num_key_value_heads"}),
}


def save(config: PreTrainedConfig, directory: Path, shard: str = "50GB") -> PreTrainedModel:
    """Write a model with random weights, also of biases and norms, and return it."""
    torch.manual_seed(0)
    model: PreTrainedModel = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(directory, max_shard_size=shard)
    return model.train()


def layered(directory: Path, context: int = CONTEXT) -> HuggingFaceModel:
    """The model of a directory as layers."""
    return HuggingFaceModel(HuggingFace(path=str(directory), context=context))


_SHARED = tempfile.TemporaryDirectory(prefix="decoders-")
"""Removed when the tests end."""


@cache
def shared(name: str) -> tuple[Path, HuggingFaceModel]:
    """A model of CONFIGS, made once for all tests, and its directory; neither is changed by anyone."""
    directory = Path(_SHARED.name) / name
    save(CONFIGS[name], directory)
    return directory, layered(directory)


def whole_of(directory: Path) -> PreTrainedModel:
    """The model of a directory as transformers alone loads it, ready to train."""
    whole, found = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    model: PreTrainedModel = whole.train()
    return model


def untie(model: PreTrainedModel) -> PreTrainedModel:
    """Give a tied head a parameter of its own: what two stages hold."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone())
    return model


def gradients_of_layers(model: LayeredModel, layers: dict[int, nn.Module]) -> dict[tuple[str, str], torch.Tensor]:
    """Gradients by the layer's name and the parameter's."""
    return {
        (model.names[index], name): parameter.grad
        for index, layer in sorted(layers.items())
        for name, parameter in layer.named_parameters()
    }


def gradients_of_whole(model: HuggingFaceModel, whole: PreTrainedModel) -> dict[tuple[str, str], torch.Tensor]:
    """Gradients of the whole, untied model under the names that its layers give them."""
    found: dict[tuple[str, str], torch.Tensor] = {}
    block = f"{whole.base_model_prefix}.{model.anatomy.layers}."
    head, embedding = whole.get_output_embeddings().weight, whole.get_input_embeddings().weight
    names = {id(parameter): name for name, parameter in whole.named_parameters()}
    for name, parameter in whole.named_parameters():
        if name.startswith(block):
            index, _, key = name.removeprefix(block).partition(".")
            found[f"layers.{index}", key] = parameter.grad
        elif parameter is head:
            found["head", names[id(embedding)] if model.ties else name] = parameter.grad
        else:
            child = name.removeprefix(f"{whole.base_model_prefix}.").partition(".")[0]
            found["embedding" if child in model.anatomy.before else "head", name] = parameter.grad
    return found


def batches(microbatches: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Token ids, positions and targets of two samples each; the second sample holds two documents."""
    generator = torch.Generator().manual_seed(1)
    positions = torch.stack((torch.arange(CONTEXT), torch.cat((torch.arange(5), torch.arange(CONTEXT - 5)))))
    for _ in range(microbatches):
        tokens = torch.randint(VOCABULARY, (2, CONTEXT), generator=generator)
        targets = torch.randint(VOCABULARY, (2, CONTEXT), generator=generator)
        targets[1, 4] = -100
        yield tokens, positions, targets
