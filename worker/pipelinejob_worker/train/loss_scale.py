"""The dynamic loss scale of Float16 training (Micikevicius et al. 2018), with the constants of torch.amp.GradScaler.

Small gradients would underflow in float16, so the loss is multiplied by a factor, and the float32 gradients of the
weights are divided by it. A step in which they overflow is skipped and the factor halved. It is a power of two, so
dividing by it loses no bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass

GROWTH = 2.0
GROWTH_INTERVAL = 2000
"""Steps without an overflow after which the scale is doubled."""

SMALLEST, LARGEST = 1.0, 2.0**24
"""Bounds: below 1 nothing is won; 2**24 keeps any loss below 2**103 finite in float32."""


@dataclass(frozen=True)
class LossScale:
    """The factor, and how many steps in a row had finite gradients since it last changed."""

    scale: float = 65536.0
    good_steps: int = 0

    def after(self, finite: bool) -> "LossScale":
        """Return the scale of the next step; ``finite``: whether all gradients of this one were."""
        if not finite:
            return LossScale(max(self.scale / GROWTH, SMALLEST))
        if self.good_steps + 1 < GROWTH_INTERVAL:
            return LossScale(self.scale, self.good_steps + 1)
        return LossScale(min(self.scale * GROWTH, LARGEST))

    @property
    def exhausted(self) -> bool:
        """Whether no smaller scale is left: gradients that are not finite now would not be so without scaling."""
        return self.scale <= SMALLEST

    def to_numbers(self) -> dict[str, float]:
        """Return it as numbers for a checkpoint."""
        return {"lossScale": self.scale, "goodSteps": float(self.good_steps)}

    @classmethod
    def from_numbers(cls, numbers: Mapping[str, float]) -> "LossScale":
        """Return what ``to_numbers`` gave; the initial scale if there is none, as from a job in another precision."""
        if "lossScale" not in numbers:
            return cls()
        return cls(float(numbers["lossScale"]), int(numbers["goodSteps"]))
