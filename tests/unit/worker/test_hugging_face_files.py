"""A stage reads its own tensors and no others; what is missing, damaged or unfit ends in one line that says so."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import (
    BertConfig,
    DeepseekV4Config,
    Gemma3Config,
    Gemma4TextConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    T5Config,
)

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.models.hugging_face.repository import Repository
from tests.unit.worker.decoders import CONFIGS, MODERN, layered, save, shared

INDEX = "model.safetensors.index.json"


def bytes_read() -> int:
    """Bytes that this process has requested from files so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.parametrize("tied", [False, True])
def test_a_stage_requests_the_bytes_of_its_own_tensors(tied: bool, tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 4096}
    save(LlamaConfig(**{**MODERN, **sizes}, tie_word_embeddings=tied), tmp_path, shard="5MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    model = layered(tmp_path)
    model.build(range(7), seed=0)  # what transformers imports on its first build is not a tensor
    for start, stop in pairwise((0, 1, 3, 6, 7)):
        before = bytes_read()
        chunk = model.build(range(start, stop), seed=0)
        requested = bytes_read() - before
        own = sum(parameter.nbytes for layer in chunk.layers.values() for parameter in layer.parameters())
        assert own <= requested <= 1.01 * own, (start, stop)


def test_a_file_without_own_tensors_is_not_needed(tmp_path: Path) -> None:
    save(CONFIGS["Llama"], tmp_path, shard="30KB")
    files = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    needed = {file for name, file in files.items() if name.startswith("model.layers.1.")}
    for file in set(files.values()) - needed:
        (tmp_path / file).unlink()
    model = layered(tmp_path)
    model.build(range(2, 3), seed=0)
    with pytest.raises(ConfigurationError, match=r"has no file model-\d+-of-\d+\.safetensors"):
        model.build(range(6, 7), seed=0)


def test_models_are_told_apart_by_their_configuration_and_not_by_their_place(tmp_path: Path) -> None:
    one, other = shared("Llama")[1].fingerprint, shared("Mistral")[1].fingerprint
    save(CONFIGS["Llama"], tmp_path).to(torch.bfloat16).save_pretrained(tmp_path)
    assert layered(tmp_path).fingerprint == one != other
    assert layered(tmp_path, context=8).fingerprint != one


REFUSED: dict[str, tuple[PreTrainedConfig, str]] = {
    "encoder-decoder": (T5Config(), "t5 is an encoder-decoder"),
    "vision and text": (Gemma3Config(), "gemma3 has other inputs than text"),
    "layers one level deeper": (
        OPTConfig(vocab_size=96, hidden_size=32, ffn_dim=32, num_hidden_layers=2, num_attention_heads=4),
        "OPTForCausalLM cannot be cut into stages: of lists with all 2 layers there are 0 in its base model, and one "
        "deeper at decoder.layers",
    ),
    "layers in an encoder": (
        BertConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
        "BertLMHeadModel cannot be cut into stages",
    ),
    "inputs of single layers": (
        Gemma4TextConfig(**MODERN, hidden_size_per_layer_input=16, vocab_size_per_layer_input=96),
        "Gemma4ForCausalLM cannot be cut into stages: layer 0 reads more than its own parameters and one hidden state",
    ),
    "heads that do not divide the width": (
        GPT2Config(n_embd=30, n_head=4, n_layer=1),
        "GPT2LMHeadModel cannot be cut into stages: it cannot be built from its config.json (ValueError",
    ),
    "several streams": (
        DeepseekV4Config(**MODERN, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2),
        "DeepseekV4ForCausalLM cannot be cut into stages: its hidden state has 4 dimensions",
    ),
}


@pytest.mark.parametrize(("config", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_model_that_cannot_be_cut_is_refused_by_name_and_reason(
    config: PreTrainedConfig, reason: str, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    assert_refused(tmp_path, reason)


UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "quantised": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantised"),
    "own code": ({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}, "comes with code of its own"),
    "unknown": ({"model_type": "mine"}, "model_type mine is unknown"),
    "no type": ({"model_type": None}, "model_type None is unknown"),
    "senseless": ({"num_attention_heads": "many"}, "config.json does not fit model_type llama"),
    "no positions": ({"max_position_embeddings": 8}, "spec.model.huggingFace.context: 16 is more than the positions"),
}


@pytest.mark.parametrize(("changes", "reason"), UNFIT.values(), ids=UNFIT)
def test_a_configuration_that_cannot_be_trained_is_refused(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    CONFIGS["Llama"].save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert_refused(tmp_path, reason)


def _truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)


def _change(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        path = directory / "model.safetensors"
        tensors = safetensors.torch.load_file(path)
        change(tensors)
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})

    return damage


def _pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def _misindex(directory: Path) -> None:
    tensors = dict.fromkeys(safetensors.torch.load_file(directory / "model.safetensors"), "other.safetensors")
    (directory / "model.safetensors").unlink()
    del tensors["model.norm.weight"]
    safetensors.torch.save_file({"none": torch.zeros(1)}, directory / "other.safetensors")
    (directory / INDEX).write_text(json.dumps({"weight_map": tensors}))


def _point_out(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "../../secret.safetensors"}}))


NORM = "model.layers.4.mlp.up_proj.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no directory": (lambda path: path.rename(path.parent / "elsewhere"), "is not a directory"),
    "no config": (lambda path: (path / "config.json").unlink(), "has no config.json"),
    "no JSON": (lambda path: (path / "config.json").write_text("{"), "config.json is not JSON"),
    "truncated": (_truncate, "model.safetensors is truncated"),
    "missing tensor": (_change(lambda tensors: tensors.pop(NORM)), f"tensor {NORM} is in none of its files"),
    "wrong shape": (
        _change(lambda tensors: tensors.update({NORM: torch.zeros(3, 32)})),
        f"tensor {NORM} has shape [3, 32] instead of [48, 32]",
    ),
    "pickled weights": (_pickle, "has neither model.safetensors nor model.safetensors.index.json"),
    "index of another file": (_misindex, "other.safetensors: tensor"),
    "index that leads out": (_point_out, "has no weight_map from tensors to files"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named_and_never_filled_with_random_weights(
    damage: Callable[[Path], object], reason: str, tmp_path: Path
) -> None:
    save(CONFIGS["Llama"], tmp_path / "model")
    damage(tmp_path / "model")
    assert_refused(tmp_path / "model", reason)


def test_a_head_that_is_tied_in_words_only_is_refused(tmp_path: Path) -> None:
    save(CONFIGS["Llama"], tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    assert_refused(tmp_path, "ties the head to the embedding, but the files hold two different weights")


def assert_refused(directory: Path, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(reason)) as refusal:
        layered(directory).build(range(7), seed=0)
    message = str(refusal.value)
    assert message.startswith("spec.model.huggingFace.")
    assert str(directory) in message
    assert "\n" not in message
    assert ";" in message  # and the cure


@contextmanager
def unprivileged() -> Iterator[None]:
    """Without root's right to read everything, if the tests have it."""
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_directory_that_may_not_be_read_is_not_called_missing(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir(mode=0)
    with unprivileged(), pytest.raises(ConfigurationError, match="model cannot be read: Permission denied"):
        Repository(str(directory), "main").find("config.json")


class Hub(BaseHTTPRequestHandler):
    """What a hub answers for the files of one repository, under one commit."""

    directory: Path
    fetched: list[str]
    commit = "0123456789abcdef0123456789abcdef01234567"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        content = self._answer()
        if content is not None:
            self.fetched.append(self.path.rpartition("/")[2])
            self.wfile.write(content)

    def _answer(self) -> bytes | None:
        match = re.fullmatch(r"/owner/tiny/resolve/([^/]+)/([^/]+)", self.path)
        path = self.directory / match[2] if match else None
        missing = "RepoNotFound" if not match else "" if path and path.exists() else "EntryNotFound"
        content = b"" if missing or not path else path.read_bytes()
        self.send_response(404 if missing else 200)
        self.send_header("X-Error-Code", missing)
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("ETag", f'"{self.path.rpartition("/")[2]}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        return None if missing else content

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def hub(directory: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve a directory as the repository owner/tiny; its address, and the files that were fetched."""
    fetched: list[str] = []
    handler = type("Handler", (Hub,), {"directory": directory, "fetched": fetched})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", fetched
        finally:
            server.shutdown()
            thread.join()


FROM_HUB = """
from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.models import model_of
from pipelinejob_worker.protocol import HuggingFace, Model
model = model_of(Model(hugging_face=HuggingFace(path="owner/tiny", context=16)))
print(len(model.build(range(2, 3), seed=0).layers))
try:
    model_of(Model(hugging_face=HuggingFace(path="owner/none", context=16)))
except ConfigurationError as error:
    print(error)
"""


def test_from_the_hub_only_files_with_own_tensors_are_fetched(tmp_path: Path) -> None:
    save(CONFIGS["Llama"], tmp_path / "model", shard="30KB")
    files = json.loads((tmp_path / "model" / INDEX).read_text())["weight_map"]
    needed = {file for name, file in files.items() if name.startswith("model.layers.1.")}
    with hub(tmp_path / "model") as (address, fetched):
        environment = {
            **os.environ,
            "HF_ENDPOINT": address,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        result = subprocess.run(
            [sys.executable, "-c", FROM_HUB], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
    assert result.returncode == 0, result.stderr
    built, refusal = result.stdout.splitlines()
    assert built == "1"
    assert refusal.startswith("spec.model.huggingFace.path: owner/none: is no repository of the hub")
    assert sorted(fetched) == sorted({"config.json", INDEX, *needed})
    assert needed < set(files.values())
