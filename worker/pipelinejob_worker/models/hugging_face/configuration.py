"""Reading config.json, and refusing what cannot be trained stage by stage before any model is built."""

import hashlib
import json
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from pipelinejob_worker.models.hugging_face.repository import CONFIG, Repository

_OF_THE_FILE = frozenset(
    {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures"}
)
"""Keys of config.json that do not change what is trained: weights are float32 and no cache is used."""


def read_config(repository: Repository) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """Return the model's configuration, and config.json as it stands. Raises ConfigurationError."""
    raw = repository.read_json(CONFIG)
    if raw is None:
        raise repository.refused(f"has no {CONFIG}; allowed: a model as save_pretrained writes it")
    kind = raw.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise repository.refused(_unknown_kind(kind, raw))
    if "quantization_config" in raw:
        raise repository.refused(
            "is quantised (quantization_config), and integer weights cannot be trained; allowed: float32, bfloat16 or "
            "float16 weights; use the model it was made from"
        )
    try:
        config = AutoConfig.for_model(**raw)
    except Exception as error:  # checks of a configuration class raise whatever they like
        problem = " ".join(str(error).split())
        raise repository.refused(
            f"{CONFIG} does not fit model_type {kind} ({problem}); allowed: what save_pretrained writes"
        ) from error
    if config.is_encoder_decoder:
        raise repository.refused(f"{kind} is an encoder-decoder; allowed: a decoder, with one list of layers")
    if config.get_text_config() is not config:
        raise repository.refused(
            f"{kind} has other inputs than text beside its decoder; allowed: a decoder of text alone, for instance the "
            "text model of this family"
        )
    config.return_dict = True
    config.output_hidden_states = False
    if getattr(config, "output_router_logits", False):  # a loss over the routers of all stages
        config.output_router_logits = False
    return config, raw


def architecture_of(config: PreTrainedConfig, repository: Repository) -> type[PreTrainedModel]:
    """Return the class of the causal language model for a configuration. Raises ConfigurationError."""
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if not isinstance(architecture, type):
        raise repository.refused(
            f"transformers has no causal language model of model_type {config.model_type}; allowed: a decoder"
        )
    return architecture


def identity(raw: dict[str, Any]) -> str:
    """Name what is trained, by the content of config.json and not by where it lies."""
    content = json.dumps({key: raw[key] for key in sorted(raw.keys() - _OF_THE_FILE)}, sort_keys=True)
    return f"huggingFace {raw['model_type']} config={hashlib.sha256(content.encode()).hexdigest()[:16]}"


def _unknown_kind(kind: object, raw: dict[str, Any]) -> str:
    if "auto_map" in raw:
        return (
            f"model_type {kind} comes with code of its own, which is never run (trust_remote_code); allowed: an "
            "architecture of the transformers library, or spec.model.module with your code in the image"
        )
    return f"model_type {kind} is unknown to this image's transformers; allowed: an architecture of that library"
