"""A model of the user's own: a module from a ConfigMap is trained, and one that breaks its word ends in words."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import kit
from tests.e2e.conftest import ROOT
from tests.e2e.losses import of_one_process

(CONVOLUTIONS,) = re.findall(
    r"^```python\n(.*?)^```", (ROOT / "docs/how-to/own-model.md").read_text(), re.MULTILINE | re.DOTALL
)
"""The example of the guide."""

SHRINKING = (
    CONVOLUTIONS
    + '''

class Shrinking(Block):
    """Forgets the last position of each microbatch after some."""

    passes = 0

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return super().forward(hidden, positions)[:, : -1 if self.passes > self.faithful else None]


class ShrinkingModel(Convolutions):
    def layer(self, index: int, seed: int) -> nn.Module:
        layer = super().layer(index, seed)
        if index == 1:
            layer = Shrinking(self.width, self.reach)
            layer.faithful = self.faithful
        return layer


def build_shrinking(layers: str, width: str, context: str, faithful: str) -> LayeredModel:
    model = ShrinkingModel(int(layers), int(width), int(context), 4)
    model.faithful = int(faithful)
    return model
'''
)


def spec_of(namespace: kit.Namespace, source: str, function: str, more: dict[str, str], **members: Any) -> kit.Object:
    """A job with a model whose source is in a ConfigMap, on Python's path; ``more`` arguments for it."""
    namespace.apply(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "model"}, "data": {"own_model.py": source}}
    )
    spec = kit.spec(2, 30, template=kit.template(env={"PYTHONPATH": "/models"}), **members)
    given = {"layers": "3", "width": "32", "context": "32"} | more
    arguments = [{"name": name, "value": value} for name, value in given.items()]
    spec["model"] = {"module": {"function": f"own_model:{function}", "arguments": arguments}}
    pod = spec["template"]["spec"]
    pod["containers"][0]["volumeMounts"].append({"name": "model", "mountPath": "/models"})
    pod["volumes"].append({"name": "model", "configMap": {"name": "model"}})
    return spec


def test_the_model_of_the_guide_trains_from_a_config_map(
    namespace: kit.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace.claim("state")
    spec = spec_of(namespace, CONVOLUTIONS, "build", {}, checkpoint={"volumeClaimName": "state"})
    run = kit.Job(namespace, "own", spec).create()
    run.wait_succeeded()
    (tmp_path / "own_model.py").write_text(CONVOLUTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_model", raising=False)
    losses = run.losses("state")
    assert tuple(losses) == of_one_process(spec)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("faithful", "maker"), [("1", "layer blocks.0"), ("40", "chunk 0")], ids=["while measured", "while trained"]
)
def test_a_hidden_state_that_changes_its_shape_ends_the_job_in_words(
    namespace: kit.Namespace, faithful: str, maker: str
) -> None:
    spec = spec_of(namespace, SHRINKING, "build_shrinking", {"faithful": faithful})
    run = kit.Job(namespace, "shrinking", spec).create()
    failed = run.wait("Succeeded", "False", "InvalidConfiguration")
    assert f"spec.model: {maker} passes on torch.float32 [4, 31, 32]; allowed:" in failed["message"], failed["message"]
    assert "torch.float32 [4, 32, 32] in every microbatch" in failed["message"]
    assert run.status["restarts"] == 0
