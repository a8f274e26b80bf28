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


def test_layers_have_global_names(model: LayeredModel) -> None:
    assert model.names == ("embedding", "blocks.0", "blocks.1", "head")
    assert len(model.costs) == 4
    assert model.costs[1] == model.costs[2]
    assert model.costs[0] == min(model.costs)


def test_a_layers_weights_do_not_depend_on_what_was_built_before(model: LayeredModel) -> None:
    alone = model.build(2, seed=1).state_dict()
    model.build(0, seed=1)
    again = model.build(2, seed=1).state_dict()
    assert all(torch.equal(alone[name], again[name]) for name in alone)
    others = model.build(1, seed=1).state_dict(), model.build(2, seed=2).state_dict()
    assert not any(torch.equal(alone["expansion.weight"], other["expansion.weight"]) for other in others)


def test_shapes_are_as_promised_and_the_past_does_not_see_the_future(model: LayeredModel) -> None:
    layers = [model.build(index, seed=0).eval() for index in range(4)]

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        hidden = tokens
        for layer in layers:
            hidden = layer(hidden)
            assert layer is layers[-1] or hidden.shape == model.hidden(3).shape
        return hidden

    with torch.no_grad():
        tokens = torch.arange(24).view(3, 8)
        assert tokens.shape == model.inputs(3).shape
        before = logits(tokens)
        assert before.shape == model.outputs(3).shape
        tokens[:, -1] = 99
        after = logits(tokens)
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])


def test_the_fingerprint_tells_models_apart(model: LayeredModel) -> None:
    same = model_of(Model(preset=PRESET.model_copy(update={"dropout": "0.0"})))
    other = model_of(Model(preset=PRESET.model_copy(update={"dropout": "0.1"})))
    assert model.fingerprint == same.fingerprint != other.fingerprint


def test_seeds_depend_on_all_values_and_their_order() -> None:
    seeds = {mix(1, 2), mix(2, 1), mix(1, 2, 0), mix(0, 1, 2), mix(1, 3)}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
