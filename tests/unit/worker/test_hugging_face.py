"""A decoder of the transformers library, cut anywhere, computes the bits of the whole one."""

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from transformers import GPT2Config

from pipelinejob_worker.models import Chunk, LayeredModel
from pipelinejob_worker.pipeline.stage import RandomState, prepare_layers
from pipelinejob_worker.protocol import Data, Train
from tests.unit.worker.decoders import (
    BLOCKS,
    CONFIGS,
    CONTEXT,
    batches,
    gradients_of_layers,
    gradients_of_whole,
    layered,
    save,
    shared,
    untie,
    whole_of,
)

LAYERS = BLOCKS + 2
CUTS = [(0, LAYERS), (0, 3, LAYERS), (0, 1, LAYERS - 1, LAYERS), (0, 2, 3, LAYERS - 1, LAYERS)]

Gradients = dict[tuple[str, str], torch.Tensor]


def build(model: LayeredModel, cuts: Sequence[int]) -> list[Chunk]:
    return [model.build(range(start, stop), seed=0) for start, stop in pairwise(cuts)]


def train(
    model: LayeredModel, chunks: list[Chunk], microbatches: int = 3, *, split: bool = False
) -> tuple[list[torch.Tensor], list[float], Gradients]:
    """Logits and losses of the microbatches and the gradients of all, with nothing but hidden states and their
    gradients between the chunks. ``split``: the backward pass is made in two parts, as zero-bubble schedules do.
    """
    logits, losses = [], []
    for tokens, positions, targets in batches(microbatches):
        passes, hidden = [], tokens
        for chunk in chunks:
            received = hidden.detach().requires_grad_(hidden.is_floating_point())
            hidden = chunk(received, positions)
            passes.append((chunk, received, hidden))
        logits.append(hidden)
        loss = model.loss(hidden, targets)
        losses.append(loss.item())
        gradient = None
        for chunk, received, sent in reversed(passes):
            backward(chunk, received, loss if sent is hidden else sent, gradient, split=split)
            gradient = received.grad
    layers = {index: layer for chunk in chunks for index, layer in chunk.layers.items()}
    return logits, losses, gradients_of_layers(model, layers)


def backward(
    chunk: Chunk, received: torch.Tensor, result: torch.Tensor, gradient: torch.Tensor | None, *, split: bool
) -> None:
    if not split or not received.requires_grad:
        torch.autograd.backward(result, gradient)
        return
    gradients = None if gradient is None else [gradient]
    _, groups = stage_backward_input([result], gradients, [received], chunk.parameters())
    stage_backward_weight(chunk.parameters(), groups)


def assert_same(one: Gradients, other: Gradients) -> None:
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.mark.parametrize("name", CONFIGS)
def test_any_cut_has_logits_loss_and_gradients_of_the_whole_model(name: str) -> None:
    directory, model = shared(name)
    whole = untie(whole_of(directory))
    expected_logits, expected_losses = [], []
    for tokens, positions, targets in batches(3):
        output = whole(
            input_ids=tokens,
            position_ids=positions,
            labels=targets,
            shift_labels=targets,
            num_items_in_batch=1,
            use_cache=False,
        )
        output.loss.backward()
        expected_logits.append(output.logits)
        expected_losses.append(output.loss.item())

    assert model.names == ("embedding", *(f"layers.{index}" for index in range(BLOCKS)), "head")
    assert bool(model.ties) == CONFIGS[name].tie_word_embeddings
    for cuts in CUTS:
        logits, losses, gradients = train(model, build(model, cuts))
        assert all(map(torch.equal, logits, expected_logits)), cuts
        assert losses == expected_losses
        assert_same(gradients, gradients_of_whole(model, whole))

    assert_same(train(model, build(model, CUTS[-1]), split=True)[2], gradients_of_whole(model, whole))


@pytest.mark.parametrize("name", ["Llama tied", "GPT-2"])
def test_shapes_costs_and_ties_are_those_of_the_layers(name: str) -> None:
    directory, model = shared(name)
    (chunk,) = build(model, (0, LAYERS))
    assert [cost.parameters for cost in model.costs] == [
        sum(parameter.numel() for parameter in layer.parameters()) for layer in chunk.layers.values()
    ]
    matrices = sum(parameter.numel() for parameter in chunk.layers[1].parameters() if parameter.dim() > 1)
    attention = CONTEXT * model.width  # half of the context on average, for scores and for values
    assert model.costs[1].flops == 2 * (matrices + attention)
    assert model.costs[0].flops == 0
    assert model.costs[-1].flops == 2 * model.vocabulary * model.width

    (tie,) = model.ties
    first = chunk.layers[tie.first_layer].get_parameter(tie.first_parameter)
    last = chunk.layers[tie.last_layer].get_parameter(tie.last_parameter)
    assert torch.equal(first, last)
    assert first.data_ptr() != last.data_ptr()
    assert torch.equal(first, whole_of(directory).get_input_embeddings().weight)
    tokens, positions, _ = next(batches(1))
    assert tokens.shape == model.inputs(2).shape
    assert model.build(range(3), seed=0)(tokens, positions).shape == model.hidden(2).shape


def test_all_weights_are_float32_and_train_whatever_type_the_files_have(tmp_path: Path) -> None:
    whole = save(CONFIGS["Qwen 3"], tmp_path / "float32").to(torch.bfloat16)
    whole.save_pretrained(tmp_path / "bfloat16")
    (chunk,) = build(layered(tmp_path / "bfloat16"), (0, LAYERS))
    assert {parameter.dtype for parameter in chunk.parameters()} == {torch.float32}
    assert all(module.training for module in chunk.modules())
    assert torch.equal(
        chunk.layers[2].get_parameter("mlp.up_proj.weight"), whole.model.layers[1].mlp.up_proj.weight.float()
    )


def test_dropout_depends_on_the_seed_and_not_on_the_cut_or_on_recomputation(tmp_path: Path) -> None:
    save(
        GPT2Config(**{**CONFIGS["GPT-2"].to_dict(), "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}), tmp_path
    )
    model = layered(tmp_path)

    def gradients(cuts: Sequence[int], seed: int, **settings: bool) -> Gradients:
        settings_of_job = Train(
            data=Data(files=["text"]), steps=1, global_batch_size=2, microbatches=1, seed=seed, **settings
        )
        chunks = build(model, cuts)
        for chunk in chunks:
            prepare_layers(chunk, settings_of_job, RandomState(seed))
        return train(model, chunks)[2]

    expected = gradients(CUTS[0], seed=3)
    other = gradients(CUTS[0], seed=4)
    assert not any(torch.equal(expected[key], other[key]) for key in expected)
    for cuts in CUTS[1:]:
        assert_same(gradients(cuts, seed=3), expected)
        assert_same(gradients(cuts, seed=3, activation_checkpointing=True), expected)


def wrapped(chunk: Chunk, wrap: Callable[[int, Callable[..., Any]], Callable[..., Any]]) -> Chunk:
    for index, layer in chunk.layers.items():
        layer.forward = wrap(index, layer.forward)  # type: ignore[method-assign]
    return chunk


def test_each_layers_forward_is_called_once_and_compiles_to_one_graph() -> None:
    _, model = shared("Gemma 3")
    _, _, expected = train(model, build(model, CUTS[0]), microbatches=2)

    calls: list[int] = []

    def called(index: int, forward: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        calls.append(index)
        return forward(*arguments, **keywords)

    def compiled(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        # No code is generated, so the bits stay; fullgraph makes a break, or too many graphs, an error.
        return partial(called, index, torch.compile(forward, backend="eager", fullgraph=True))

    torch.compiler.reset()
    chunks = [wrapped(chunk, compiled) for chunk in build(model, CUTS[1])]
    _, _, gradients = train(model, chunks, microbatches=2)
    assert calls == [*range(LAYERS)] * 2
    assert_same(gradients, expected)


def test_no_hidden_state_outlives_its_pass() -> None:
    chunk = shared("Llama")[1].build(range(2, 4), seed=0)
    hidden = torch.randn(1, CONTEXT, 32)
    with torch.no_grad():
        passed_on = chunk(hidden, torch.arange(CONTEXT)[None])
    received, sent = weakref.ref(hidden), weakref.ref(passed_on)
    del hidden, passed_on
    assert received() is None
    assert sent() is None
