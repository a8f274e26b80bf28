"""Before training on packed documents, each stage proves on its layers that no document sees another."""

from pathlib import Path

import pytest
import torch
from transformers import BloomConfig, GptOssConfig, PreTrainedConfig

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.models import LayeredModel, check_packing, model_of
from pipelinejob_worker.protocol import Model, Preset
from tests.unit.worker.decoders import CONFIGS, MODERN, SPECIAL, VOCABULARY, layered, save, shared

CPU = torch.device("cpu")
PARTS = [range(2), range(2, 5), range(5, 7)]


def gpt(*, documents: bool) -> LayeredModel:
    preset = Preset(name="gpt", layers=5, width=16, heads=2, context=16, dropout="0.5")
    return model_of(Model(preset=preset), documents=documents)


@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_of_known_decoders_pass(name: str) -> None:
    _, model = shared(name)
    assert model.separates_documents
    for part in PARTS:
        chunk = model.build(part, seed=0)
        check_packing(model, chunk, CPU)
        assert chunk.training


def test_the_preset_passes_only_if_it_was_built_for_documents() -> None:
    for part in PARTS:
        check_packing(gpt(documents=True), gpt(documents=True).build(part, seed=0), CPU)
    leaking = gpt(documents=False).build(range(1, 2), seed=0)
    with pytest.raises(ConfigurationError, match="of its size with the document before it"):
        check_packing(gpt(documents=True), leaking, CPU)


LEAKS: dict[str, tuple[PreTrainedConfig, str]] = {
    "takes no positions": (
        BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=5, n_head=4, **SPECIAL),
        "its layers take no positions",
    ),
    "takes them in vain": (
        GptOssConfig(**MODERN, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4),
        "of its size with the document before it",
    ),
}


@pytest.mark.parametrize(("config", "reason"), LEAKS.values(), ids=LEAKS)
def test_a_decoder_whose_documents_see_each_other_is_refused(
    config: PreTrainedConfig, reason: str, tmp_path: Path
) -> None:
    save(config, tmp_path)
    model = layered(tmp_path)
    for part in PARTS[:2]:
        with pytest.raises(ConfigurationError, match=f"^spec.train.data.packing: .*{reason}.*; allowed: Stream"):
            check_packing(model, model.build(part, seed=0), CPU)


def test_positions_that_do_not_restart_are_found() -> None:
    class Counting(torch.nn.Module):
        def forward(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            return hidden + torch.arange(positions.shape[1])[None, :, None]

    model = gpt(documents=True)
    chunk = model.build(range(1, 2), seed=0)
    chunk.layers[1].forward = Counting().forward  # type: ignore[method-assign]
    with pytest.raises(ConfigurationError, match="a document alone and behind another differ"):
        check_packing(model, chunk, CPU)
