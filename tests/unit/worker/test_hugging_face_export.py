"""Trained layers become a directory that transformers loads, with every bit and the original names."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.models.hugging_face import HuggingFaceModel
from pipelinejob_worker.models.hugging_face.export import export, main
from pipelinejob_worker.protocol import ExitCode
from pipelinejob_worker.state.checkpoint import CheckpointStore, Written
from tests.unit.worker.decoders import CONFIGS, batches, layered, save, shared, whole_of

TOKENIZER = '{"version": "1.0"}'
STEP = 7

State = dict[str, dict[str, torch.Tensor]]


def trained(model: HuggingFaceModel) -> tuple[State, torch.Tensor]:
    """Other weights than the files', as training leaves them, and the logits that they give."""
    chunk = model.build(range(len(model.names)), seed=0).eval()
    generator = torch.Generator().manual_seed(5)
    state: State = {}
    with torch.no_grad():
        for index, layer in chunk.layers.items():
            for parameter in layer.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
            state[model.names[index]] = {name: parameter.clone() for name, parameter in layer.named_parameters()}
        for tie in model.ties:  # as after each step of the optimizer
            shared = chunk.layers[tie.first_layer].get_parameter(tie.first_parameter)
            chunk.layers[tie.last_layer].get_parameter(tie.last_parameter).copy_(shared)
            state["head"][tie.last_parameter] = shared.clone()
        tokens, positions, _ = next(batches(1))
        return state, chunk(tokens, positions)


def stored(directory: Path) -> dict[str, torch.Tensor]:
    files = [safetensors.torch.load_file(path) for path in directory.glob("*.safetensors")]
    return {name: tensor for file in files for name, tensor in file.items()}


def logits_of(directory: Path) -> torch.Tensor:
    whole = whole_of(directory)
    assert whole.dtype == torch.float32
    tokens, positions, _ = next(batches(1))
    with torch.no_grad():
        logits: torch.Tensor = whole.eval()(input_ids=tokens, position_ids=positions, use_cache=False).logits
    return logits


@pytest.mark.parametrize("name", CONFIGS)
def test_an_exported_model_reloads_with_every_bit_and_the_original_names(name: str, tmp_path: Path) -> None:
    directory, model = shared(name)
    (directory / "tokenizer.json").write_text(TOKENIZER)
    state, logits = trained(model)
    export(model, state.__getitem__, tmp_path / "exported")
    before, after = stored(directory), stored(tmp_path / "exported")
    assert after.keys() == before.keys()
    assert not any(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(logits_of(tmp_path / "exported"), logits)
    assert layered(tmp_path / "exported").fingerprint == model.fingerprint
    assert (tmp_path / "exported/tokenizer.json").read_text() == TOKENIZER
    assert (tmp_path / "exported/generation_config.json").exists()


def test_a_model_of_half_precision_is_exported_in_the_precision_of_training(tmp_path: Path) -> None:
    save(CONFIGS["Llama"], tmp_path / "model").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    model = layered(tmp_path / "model")
    state, logits = trained(model)
    export(model, state.__getitem__, tmp_path / "exported")
    assert torch.equal(logits_of(tmp_path / "exported"), logits)


def test_an_export_is_whole_or_not_there(tmp_path: Path) -> None:
    _, model = shared("Llama tied")
    state, _ = trained(model)
    output = tmp_path / "exports/first"

    def refused(layer: str, name: str, tensor: torch.Tensor | None) -> str:
        weights = {**state, layer: {**state[layer], name: tensor}} if tensor is not None else {**state, layer: {}}
        with pytest.raises(ConfigurationError) as refusal:
            export(model, weights.__getitem__, output)
        assert list(output.parent.iterdir()) == []
        return str(refusal.value)

    norm = "input_layernorm.weight"
    assert f"layer layers.2 has weight {norm} with shape none" in refused("layers.2", norm, None)
    assert "with shape (3,), the model has (32,)" in refused("layers.2", norm, torch.zeros(3))
    assert "with shape (3,), the model has none" in refused("layers.2", "more", torch.zeros(3))
    tied = model.ties[0].last_parameter
    assert "different copies of their one weight" in refused("head", tied, state["head"][tied] + 1)

    export(model, state.__getitem__, output)
    with pytest.raises(ConfigurationError, match=r"first exists; allowed: a new directory"):
        export(model, state.__getitem__, output)


def checkpoint(directory: Path, model: HuggingFaceModel, state: State, parts: int) -> Path:
    """Write a checkpoint as the ranks of ``parts`` pipelines do, each with its share of every layer."""
    directory.mkdir()
    store = CheckpointStore(directory, f"{model.fingerprint} seed=3", attempt=0)
    for part in range(parts):
        files = {}
        for layer, weights in state.items():
            share = {
                f"{kind}.{name}": tensor.clone()
                for place, (name, tensor) in enumerate(weights.items())
                for kind in ("weight", "exp_avg")
                if place % parts == part
            }
            files[layer] = store.write_layer(STEP, layer, safetensors.torch.save(share), part=part, parts=parts)
        store.write_list(STEP, part, Written(part=part, layers=files))
    store.publish(STEP, model.names, ranks=parts, parts=parts, extra={})
    return directory / f"step-{STEP:09d}"


@pytest.mark.parametrize("parts", [1, 2])
def test_a_checkpoint_is_exported_by_a_command(parts: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory, model = shared("Qwen 3")
    state, logits = trained(model)
    step = checkpoint(tmp_path / "checkpoints", model, state, parts)

    def run(model_directory: Path, output: str) -> int:
        return main(["--checkpoint", str(step), "--model", str(model_directory), "--output", str(tmp_path / output)])

    assert run(directory, "exported") == 0
    assert f"step {STEP} of huggingFace qwen3" in capsys.readouterr().out
    assert torch.equal(logits_of(tmp_path / "exported"), logits)

    assert run(shared("Llama")[0], "wrong") == ExitCode.CONFIGURATION
    assert "is of 'huggingFace qwen3" in capsys.readouterr().err

    damaged = next(step.glob("layers.1.*"))
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    assert run(directory, "damaged") == ExitCode.CONFIGURATION
    assert "SHA-256 is not that of the manifest" in capsys.readouterr().err
    assert not (tmp_path / "damaged").exists()
