"""A model from a function in the user's image: called with strings, checked, and refused in one line."""

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.models import LayeredModel, check_packing, model_of
from pipelinejob_worker.protocol import Argument, Model, Module

GUIDE = Path(__file__).parents[3] / "docs/how-to/own-model.md"

Write = Callable[[str], None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write the module ``mypackage.model``, as the user's image would have it."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mypackage").mkdir()

    def write_module(text: str) -> None:
        (tmp_path / "mypackage/model.py").write_text(text)
        importlib.invalidate_caches()

    yield write_module
    for name in ("mypackage.model", "mypackage"):
        sys.modules.pop(name, None)


def build(function: str = "mypackage.model:build", **arguments: str) -> LayeredModel:
    module = Module(
        function=function, arguments=[Argument(name=name, value=value) for name, value in arguments.items()]
    )
    return model_of(Model(module=module))


def example() -> str:
    (block,) = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    return str(block)


def test_the_example_of_the_guide_is_a_model_that_trains_for_any_cut(write: Write) -> None:
    write(example())
    model = build(layers="3", width="16", context="12")
    assert model.names == ("embedding", "blocks.0", "blocks.1", "blocks.2", "head")
    assert model.fingerprint != build(layers="3", width="16", context="13").fingerprint
    tokens = torch.randint(model.vocabulary, (2, 12), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(12).expand(2, 12)

    def logits(*cuts: range) -> torch.Tensor:
        hidden = tokens
        for cut in cuts:
            hidden = model.build(cut, seed=1)(hidden, positions)
        return hidden

    whole = logits(range(5))
    assert whole.shape == (2, 12, model.vocabulary)
    assert torch.equal(logits(range(2), range(2, 4), range(4, 5)), whole)
    loss = model.loss(whole, tokens)
    loss.backward()
    assert loss.item() == pytest.approx(24 * 5.6, rel=0.1)  # of a model that knows nothing, ln 256 for each token

    layers = model.build(range(5), seed=1).layers
    assert [cost.parameters for cost in model.costs] == [
        sum(parameter.numel() for parameter in layer.parameters()) for layer in layers.values()
    ]
    with pytest.raises(ConfigurationError, match="its layers take no positions"):
        check_packing(model, model.build(range(5), seed=1), torch.device("cpu"))


WRONG: dict[str, tuple[str, str]] = {
    "missing module": ("", "cannot be imported: mypackage.model raised ModuleNotFoundError"),
    "syntax error": ("def build(:", "cannot be imported: mypackage.model raised SyntaxError"),
    "error on import": ("1 / 0", "cannot be imported: mypackage.model raised ZeroDivisionError: division by zero"),
    "no function": ("x = 1", "module mypackage.model has no build"),
    "not a function": ("build = 1", "module mypackage.model holds no function in its build"),
    "raises": ("def build(): raise KeyError('layers\\nare missing')", "raised KeyError: 'layers"),
    "another type": ("def build(): return 5", "returned a int"),
    "unfinished": (
        "from pipelinejob_worker.models import ListModel\n"
        "class Own(ListModel):\n    def layer(self, index, seed): ...\ndef build(): return Own()",
        "returned a model without names",
    ),
}


@pytest.mark.parametrize(("text", "reason"), WRONG.values(), ids=WRONG)
def test_what_is_no_model_is_refused_with_its_reason(write: Write, text: str, reason: str) -> None:
    if text:
        write(text)
    with pytest.raises(ConfigurationError) as refusal:
        build()
    message = str(refusal.value)
    assert message.startswith("spec.model.module.function: mypackage.model:build: ")
    assert reason in message
    assert "; allowed: " in message
    assert "\n" not in message


def test_arguments_that_do_not_fit_are_told_from_errors_inside_the_function(write: Write) -> None:
    write(example())
    with pytest.raises(
        ConfigurationError, match=r"^spec\.model\.module\.arguments: .*missing a required argument: 'width'"
    ):
        build(layers="3")
    with pytest.raises(
        ConfigurationError, match=r"^spec\.model\.module\.arguments: .*unexpected keyword argument 'depth'"
    ):
        build(layers="3", width="8", depth="1")
    with pytest.raises(
        ConfigurationError, match=r"^spec\.model\.module\.function: .*raised ValueError: invalid literal"
    ):
        build(layers="three", width="8")


def test_layers_need_distinct_names_and_a_cost_each(write: Write) -> None:
    write(
        example()
        + "\ndef doubled():\n    model = build('2', '8')\n    model.names = ('a', 'b', 'a')\n    return model\n"
    )
    with pytest.raises(ConfigurationError, match="layers' names are not distinct"):
        build("mypackage.model:doubled")
    write(example() + "\ndef uncosted():\n    model = build('2', '8')\n    model.costs = ()\n    return model\n")
    sys.modules.pop("mypackage.model")
    with pytest.raises(ConfigurationError, match="4 names and 0 costs"):
        build("mypackage.model:uncosted")


def test_a_refusal_of_the_users_own_stays_as_it_is(write: Write) -> None:
    write("from pipelinejob_worker.errors import ConfigurationError\ndef build(): raise ConfigurationError('no: yes')")
    with pytest.raises(ConfigurationError, match=r"^no: yes$"):
        build()
