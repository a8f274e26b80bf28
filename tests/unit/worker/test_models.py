"""A model's layers are functions of the seed and of their own index."""

import pytest
import torch

from pipelinejob_worker.models import LayeredModel, model_of
from pipelinejob_worker.models.randomness import mix
from pipelinejob_worker.protocol import Model, Preset

PRESET = Preset(name="gpt", layers=2, width=16, heads=2, context=8)


@pytest.fixture
def model() -> LayeredModel:
    return model_of(Model(preset=PRESET))


def test_layers_have_global_names_and_known_costs(model: LayeredModel) -> None:
    assert model.names == ("embedding", "blocks.0", "blocks.1", "head")
    chunk = model.build(range(4), seed=1)
    for index, cost in enumerate(model.costs):
        assert cost.parameters == sum(parameter.numel() for parameter in chunk.layers[index].parameters())
    assert model.costs[0].flops == 0
    assert model.costs[3].flops == 2 * 16 * 256
    assert model.costs[1].flops == model.costs[2].flops == 2 * (12 * 16 * 16 + 16 * 8)


def test_a_layers_weights_do_not_depend_on_what_was_built_with_it(model: LayeredModel) -> None:
    def weights(indices: range, index: int, seed: int = 1) -> dict[str, torch.Tensor]:
        return model.build(indices, seed).layers[index].state_dict()

    alone, together = weights(range(2, 3), 2), weights(range(4), 2)
    assert all(torch.equal(alone[name], together[name]) for name in alone)
    others = weights(range(4), 1), weights(range(2, 3), 2, seed=2)
    assert not any(torch.equal(alone["expansion.weight"], other["expansion.weight"]) for other in others)


def test_shapes_are_as_promised_and_the_past_does_not_see_the_future(model: LayeredModel) -> None:
    front, back = model.build(range(2), seed=0).eval(), model.build(range(2, 4), seed=0).eval()
    positions = torch.arange(8).expand(3, 8)

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        hidden = front(tokens, positions)
        assert (hidden.shape, hidden.dtype) == (model.hidden(3).shape, model.hidden(3).dtype)
        return back(hidden, positions)

    with torch.no_grad():
        tokens = torch.arange(24).view(3, 8)
        assert tokens.shape == model.inputs(3).shape
        before = logits(tokens)
        assert before.shape == (3, 8, model.vocabulary)
        tokens[:, -1] = 99
        after = logits(tokens)
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])


def test_a_document_does_not_see_the_one_before_it() -> None:
    model = model_of(Model(preset=PRESET), documents=True)
    chunk = model.build(range(4), seed=0).eval()
    tokens = torch.arange(8).view(1, 8)
    packed_positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        packed = chunk(tokens, packed_positions)
        alone = chunk(tokens[:, 3:], packed_positions[:, 3:])
    assert torch.allclose(packed[:, 3:], alone, atol=1e-6)


def test_tied_ends_are_two_parameters_of_the_same_bits() -> None:
    tied = PRESET.model_copy(update={"tie_embeddings": True})
    model = model_of(Model(preset=tied))
    (tie,) = model.ties
    whole = model.build(range(4), seed=3)
    first = whole.layers[tie.first_layer].get_parameter(tie.first_parameter)
    last = whole.layers[tie.last_layer].get_parameter(tie.last_parameter)
    assert first is not last
    assert torch.equal(first, last)
    elsewhere = model.build(range(3, 4), seed=3).layers[3].get_parameter(tie.last_parameter)
    assert torch.equal(elsewhere, first)


def test_the_fingerprint_tells_models_apart(model: LayeredModel) -> None:
    same = model_of(Model(preset=PRESET.model_copy(update={"dropout": "0.0"})))
    other = model_of(Model(preset=PRESET.model_copy(update={"dropout": "0.1"})))
    assert model.fingerprint == same.fingerprint != other.fingerprint


def test_seeds_depend_on_all_values_and_their_order() -> None:
    seeds = {mix(1, 2), mix(2, 1), mix(1, 2, 0), mix(0, 1, 2), mix(1, 3)}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
