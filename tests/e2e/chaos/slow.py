"""The preset ``gpt`` with layers that take more time and may hold more: a model to aim at and to measure with.

Its losses are the preset's: a layer only sleeps before it runs, and what it holds beside its weights is never used.
Jobs get this file from a ConfigMap.
"""

import time

import torch
from torch import nn

from pipelinejob_worker.models.gpt import Gpt
from pipelinejob_worker.protocol import Preset


class Slow(Gpt):
    """``seconds``: of each forward pass of a layer; ``ballast``: unused weights of each layer, which have moments."""

    def __init__(self, preset: Preset, seconds: float, ballast: int) -> None:
        super().__init__(preset)
        self._seconds, self._ballast = seconds, ballast
        self.fingerprint += f" ballast={ballast}"

    def layer(self, index: int, seed: int) -> nn.Module:
        layer = super().layer(index, seed)
        if self._ballast:
            layer.register_parameter("ballast", nn.Parameter(torch.zeros(self._ballast)))
        layer.register_forward_pre_hook(lambda *_: time.sleep(self._seconds))
        return layer


def build(seconds: str, ballast: str = "0", **preset: str) -> Slow:
    """Return the preset of these members, slower."""
    return Slow(Preset.model_validate(preset), float(seconds), int(ballast))
