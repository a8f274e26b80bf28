"""Turning trained layers into a directory that transformers loads, one layer in memory at a time.

``python -m pipelinejob_worker.models.hugging_face.export --checkpoint DIR/step-N --model PATH --output DIR``
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.models.hugging_face.chunk import layers_of, load, parts_of, silence
from pipelinejob_worker.models.hugging_face.model import HuggingFaceModel
from pipelinejob_worker.models.hugging_face.repository import CONFIG
from pipelinejob_worker.models.hugging_face.weights import INDEX, SINGLE
from pipelinejob_worker.models.layered import Tie
from pipelinejob_worker.protocol import ExitCode, HuggingFace
from pipelinejob_worker.state.checkpoint import CheckpointDamagedError, read_layer, read_manifest

CONTEXT = 2
"""Tokens of a sample do not matter here: layers are the same for each number."""

WEIGHT = "weight."
"""What the names of weights begin with in a checkpoint; other tensors are the optimizer's."""

BESIDE = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
"""Files of a model that training does not change."""

LayerWeights = Mapping[str, torch.Tensor]
"""A layer's weights by the names of its parameters."""


def export(model: HuggingFaceModel, weights_of: Callable[[str], LayerWeights], output: Path) -> None:
    """Write a directory that ``AutoModelForCausalLM.from_pretrained`` loads, in float32.

    ``weights_of``: gives the weights of a layer by its global name; buffers are those of ``model``. ``output`` must
    not exist, and appears when it is complete. Raises ConfigurationError when weights are not those of the layer, and
    OSError.
    """
    if output.exists():
        raise ConfigurationError(f"--output: {output} exists; allowed: a new directory")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        _write(model, weights_of, partial)
        partial.chmod(0o755)
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial)
        raise


def _write(model: HuggingFaceModel, weights_of: Callable[[str], LayerWeights], directory: Path) -> None:
    files: dict[str, str] = {}
    size = 0
    last = len(model.names) - 1
    for index, name in enumerate(model.names):
        file = f"model-{index + 1:05d}-of-{last + 1:05d}.safetensors"
        (part,) = parts_of(range(index, index + 1), model.anatomy.count)
        module = load(model.anatomy, part, model.config, model.repository)
        _fill(layers_of(module, part, model.anatomy)[index], weights_of(name), name)
        tie = model.ties[0] if index == last and model.ties else None
        if tie:
            _check_tie(module, tie, weights_of(model.names[0]))
        size += _save(module, tie, directory / file)
        with safe_open(directory / file, framework="pt", backend="pread") as saved:
            files |= dict.fromkeys(saved.keys(), file)
    _write_json(directory / INDEX, {"metadata": {"total_size": size}, "weight_map": files})
    config = {key: value for key, value in model.raw_config.items() if key != "torch_dtype"}
    _write_json(directory / CONFIG, {**config, "dtype": "float32"})
    for name in BESIDE:
        if path := model.repository.find(name):
            shutil.copyfile(path, directory / name)


def _fill(layer: torch.nn.Module, weights: LayerWeights, name: str) -> None:
    parameters = dict(layer.named_parameters())
    for key in sorted(parameters.keys() | weights.keys()):
        wanted = tuple(parameters[key].shape) if key in parameters else "none"
        found = tuple(weights[key].shape) if key in weights else "none"
        if wanted != found:
            raise ConfigurationError(
                f"--checkpoint: layer {name} has weight {key} with shape {found}, the model has {wanted}; allowed: a "
                "checkpoint of this model"
            )
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(weights[key])


def _check_tie(head: PreTrainedModel, tie: Tie, embedding: LayerWeights) -> None:
    if not torch.equal(head.get_parameter(tie.last_parameter), embedding[tie.first_parameter]):
        raise ConfigurationError(
            "--checkpoint: embedding and head hold different copies of their one weight; allowed: a checkpoint that "
            "training wrote; export an earlier one"
        )


def _save(part: PreTrainedModel, tie: Tie | None, path: Path) -> int:
    """Save one layer under the names of the original files, a tied weight only with the embedding; return its bytes."""
    state: dict[str, torch.Tensor] = part.state_dict()
    if tie:
        shared = state[tie.last_parameter].data_ptr()
        state = {key: tensor for key, tensor in state.items() if tensor.data_ptr() != shared}
    with tempfile.TemporaryDirectory(dir=path.parent) as directory, silence():
        part.save_pretrained(directory, state_dict=state, max_shard_size=sys.maxsize)
        (Path(directory) / SINGLE).rename(path)
    path.chmod(0o644)  # like the other files: whoever serves the model is another user
    return sum(tensor.nbytes for tensor in state.values())


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


class Trained:
    """The weights in a complete checkpoint of the model with this identity, whatever its seed and split."""

    def __init__(self, directory: Path, identity: str) -> None:
        """Raise CheckpointDamagedError when it has no valid manifest, ConfigurationError when it is another model's."""
        self._directory = directory
        self._manifest = read_manifest(directory)
        self.step = self._manifest.step
        if not self._manifest.fingerprint.startswith(f"{identity} "):
            raise ConfigurationError(
                f"--checkpoint: {directory} is of '{self._manifest.fingerprint}', --model is '{identity}'; allowed: a "
                "checkpoint of that model"
            )

    def weights(self, layer: str) -> LayerWeights:
        """Read a layer's weights and verify its files. Raises CheckpointDamagedError."""
        state = read_layer(self._directory, self._manifest, layer)
        return {key.removeprefix(WEIGHT): tensor for key, tensor in state.items() if key.startswith(WEIGHT)}


def main(arguments: list[str]) -> int:
    """Export the checkpoint that the command line names; return the exit code."""
    parser = argparse.ArgumentParser(description="Write a checkpoint as a directory that transformers loads.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="directory step-N of a job's checkpoints")
    parser.add_argument("--model", required=True, help="spec.model.huggingFace.path of the job")
    parser.add_argument("--revision", default="main", help="spec.model.huggingFace.revision of the job")
    parser.add_argument("--output", type=Path, required=True, help="directory to make")
    options = parser.parse_args(arguments)
    try:
        model = HuggingFaceModel(HuggingFace(path=options.model, revision=options.revision, context=CONTEXT))
        checkpoint = Trained(options.checkpoint, model.identity)
        export(model, checkpoint.weights, options.output)
    except (ConfigurationError, CheckpointDamagedError) as error:
        print(error, file=sys.stderr)
        return ExitCode.CONFIGURATION
    print(f"{options.output}: step {checkpoint.step} of {model.identity}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
