"""The layers of the stages compute over the cache what the whole model computes without."""

import random
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, PreTrainedModel

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.models.gpt import Gpt
from pipelinejob_worker.protocol import Preset
from pipelinejob_worker.serve.batch import BLOCK, Batch, Piece, blocks_for
from pipelinejob_worker.serve.stage import Stage, split
from pipelinejob_worker.serve.wire import Sampling
from tests.unit.worker.decoders import CONFIGS, MODERN, SPECIAL, VOCABULARY, layered, save
from tests.unit.worker.serve.group import stages_of

CONTEXT = 64
CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0)


Logits = dict[tuple[int, int], torch.Tensor]
"""By request and position."""


def run(stages: list[Stage], pieces: list[Piece], tokens: list[int]) -> torch.Tensor:
    hidden = None
    for stage in stages:
        hidden = stage.run(Batch(0, tuple(pieces), tuple(tokens)), hidden)
    assert hidden is not None
    return hidden


def serve(stages: list[Stage], requests: list[list[int]], seed: int) -> Logits:
    """Run the requests in chunks of random sizes and batches of random composition, over random blocks.

    A chunk is one piece, or one piece for each token: only behind a piece there are logits.
    """
    drawn = random.Random(seed)
    blocks = drawn.sample(range(1, 41), 40)
    tables = [tuple(blocks.pop() for _ in range(blocks_for(len(tokens)))) for tokens in requests]
    done = [0] * len(requests)
    logits: Logits = {}
    while unfinished := [index for index, tokens in enumerate(requests) if done[index] < len(tokens)]:
        pieces, tokens, places = [], [], []
        for index in drawn.sample(unfinished, drawn.randint(1, len(unfinished))):
            start = done[index]
            end = done[index] = min(start + drawn.choice([1, 5, 20]), len(requests[index]))
            tokens += requests[index][start:end]
            if drawn.random() < 0.3:
                pieces.append(Piece(start, end - start, tables[index], sampling=None))
            else:
                pieces += [Piece(place, 1, tables[index], GREEDY) for place in range(start, end)]
                places += [(index, place) for place in range(start, end)]
        logits |= zip(places, run(stages, pieces, tokens), strict=True)
    return logits


def requests_of(count: int = 5) -> list[list[int]]:
    drawn = random.Random(3)
    return [drawn.choices(range(VOCABULARY), k=length) for length in drawn.sample(range(2, CONTEXT), count)]


def reference(whole: PreTrainedModel, requests: list[list[int]]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [whole.eval()(torch.tensor([tokens]), use_cache=False).logits[0] for tokens in requests]


@pytest.mark.parametrize("name", ["Llama tied", "Qwen 2", "Gemma 2"])
def test_logits_are_those_of_the_whole_model_whatever_the_batches_and_the_split(name: str, tmp_path: Path) -> None:
    whole = save(CONFIGS[name], tmp_path)
    requests = requests_of()
    expected = reference(whole, requests)
    model = layered(tmp_path, CONTEXT)
    for count in (1, 4):
        logits = serve(stages_of(model, count), requests, seed=count)
        assert len(logits) > 50
        for (index, position), row in logits.items():
            torch.testing.assert_close(row, expected[index][position], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["Llama", "Qwen 3", "Mistral", "Gemma 2", "Gemma 3", "GPT-2", "GPT-NeoX"])
def test_deterministic_logits_have_the_same_bits_whatever_the_batches_and_the_split(name: str, tmp_path: Path) -> None:
    whole = save(CONFIGS[name], tmp_path)
    requests = requests_of()
    expected = reference(whole, requests)
    model = layered(tmp_path, CONTEXT)
    runs = [serve(stages_of(model, count, deterministic=True), requests, seed) for count, seed in ((1, 0), (4, 1))]
    common = runs[0].keys() & runs[1].keys()
    assert len(common) > 20
    assert [place for place in common if not torch.equal(runs[0][place], runs[1][place])] == []
    for (index, position), row in runs[0].items():
        torch.testing.assert_close(row, expected[index][position], atol=1e-5, rtol=1e-5)


def test_without_deterministic_the_bits_depend_on_the_batch(tmp_path: Path) -> None:
    save(CONFIGS["Llama"], tmp_path)
    requests = requests_of()
    stages = stages_of(layered(tmp_path, CONTEXT), 1)
    one, other = (serve(stages, requests, seed) for seed in range(2))
    assert any(not torch.equal(one[place], other[place]) for place in one.keys() & other.keys())


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_preset_is_served_like_it_is_trained_also_over_many_blocks(deterministic: bool) -> None:
    model = Gpt(Preset(name="gpt", layers=3, width=32, heads=4, context=256))
    drawn = random.Random(4)
    requests = [drawn.choices(range(VOCABULARY), k=length) for length in (250, 140, 65, 3)]
    chunk = model.build(range(5), seed=0).eval()
    with torch.no_grad():
        expected = [chunk(torch.tensor([tokens]), torch.arange(len(tokens))[None])[0] for tokens in requests]
    runs = [serve(stages_of(model, count, deterministic=deterministic), requests, count) for count in (1, 5)]
    for logits in runs:
        for (index, position), row in logits.items():
            torch.testing.assert_close(row, expected[index][position], atol=1e-5, rtol=1e-5)
    common = runs[0].keys() & runs[1].keys()
    assert len(common) > 100
    assert not deterministic or all(torch.equal(runs[0][place], runs[1][place]) for place in common)


def test_blocks_are_as_many_as_fit_and_a_stage_without_attention_sets_no_limit(tmp_path: Path) -> None:
    save(CONFIGS["Llama"], tmp_path)
    model = layered(tmp_path, CONTEXT)
    size = 2 * BLOCK * MODERN["num_key_value_heads"] * 8 * 4  # keys and values of one layer in float32

    def blocks(indices: range, cache_bytes: int) -> int:
        return Stage(model, indices, CPU, cache_bytes, deterministic=False).blocks

    assert blocks(range(3), 10 * size) == 5
    assert blocks(range(2, 5), 10 * size) == 3
    assert blocks(range(6, 7), 10 * size) > 1_000_000
    assert blocks(range(1), 10 * size) > 1_000_000
    with pytest.raises(ConfigurationError, match=r"spec\.serve\.keyValueCacheMiB: 0 holds no block"):
        blocks(range(3), 2 * size - 1)


def test_no_request_reads_what_another_left_in_its_blocks(tmp_path: Path) -> None:
    save(CONFIGS["Llama"], tmp_path)
    (stage,) = stages_of(layered(tmp_path, CONTEXT), 1)
    broken = Piece(0, 20, (1, 2), GREEDY)
    alone = run([stage], [broken], list(range(20)))
    for keys, values in stage._cache._layers.values():
        with torch.inference_mode():
            keys[BLOCK:].fill_(torch.nan)
            values[BLOCK:].fill_(torch.nan)
    assert torch.equal(run([stage], [broken], list(range(20))), alone)


def test_models_that_cannot_be_served_right_are_refused_before_they_serve(tmp_path: Path) -> None:
    from transformers import BloomConfig, FalconConfig

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, **SPECIAL}
    refusals = {
        "0 of its 2 layers use an attention that can be replaced": BloomConfig(n_layer=2, n_head=4, **sizes),
        "its layers do not run with a cache": FalconConfig(num_hidden_layers=3, num_attention_heads=4, **sizes),
        "rotary embedding .dynamic. changes": CONFIGS["Llama"].__class__(
            **MODERN, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
        ),
    }
    for number, (message, config) in enumerate(refusals.items()):
        save(config, tmp_path / str(number))
        model = layered(tmp_path / str(number))
        with pytest.raises(ConfigurationError, match=message):
            Stage(model, range(len(model.names)), CPU, 1 << 20, deterministic=False)


def test_deterministic_is_refused_where_it_would_not_hold(tmp_path: Path) -> None:
    save(MixtralConfig(**MODERN), tmp_path)  # how many rows an expert gets depends on the others
    model = layered(tmp_path, CONTEXT)
    with pytest.raises(ConfigurationError, match=r"spec\.serve\.deterministic: true does not fit"):
        Stage(model, range(len(model.names)), CPU, 1 << 20, deterministic=True)


def test_pieces_are_cut_into_tiles_that_follow_one_another() -> None:
    pieces = [Piece(5, 3, (1,), GREEDY), Piece(0, 7, (2,)), Piece(9, 1, (3,), GREEDY)]
    tiles = [[(piece.start, piece.count, piece.blocks[0]) for piece in tile] for tile in split(pieces, 4)]
    assert tiles == [[(5, 3, 1), (0, 1, 2)], [(1, 4, 2)], [(5, 2, 2), (9, 1, 3)]]
    assert list(split([], 4)) == []
