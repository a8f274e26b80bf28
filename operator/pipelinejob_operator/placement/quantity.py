"""Kubernetes quantities as whole numbers, rounded up as kube-scheduler does. Pure."""

import re
from fractions import Fraction
from functools import lru_cache
from math import ceil

_FORM = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))([numkMGTPE]|[KMGTPE]i|[eE][+-]?\d{1,3}|)")
_SCALE = {
    "": Fraction(1),
    **{name: Fraction(1, 1000**power) for power, name in enumerate("mun", start=1)},
    **{name: Fraction(1000**power) for power, name in enumerate("kMGTPE", start=1)},
    **{f"{name}i": Fraction(1024**power) for power, name in enumerate("KMGTPE", start=1)},
}


@lru_cache(maxsize=4096)
def amount(resource: str, quantity: str | int | float) -> int:
    """``quantity`` in whole units of ``resource``: millicores for ``cpu``, else bytes or pieces.

    Raises ValueError when it is not a quantity.
    """
    match = _FORM.fullmatch(str(quantity))
    if match is None:
        raise ValueError(
            f"{resource}: Invalid value: {quantity!r} is no quantity; allowed: for instance 500m, 2 or 1Gi"
        )
    number, suffix = match.groups()
    scale = _SCALE[suffix] if suffix in _SCALE else Fraction(10) ** int(suffix[1:])
    return ceil(Fraction(number) * scale * (1000 if resource == "cpu" else 1))


def text(resource: str, count: int) -> str:
    """``count`` units of ``resource`` as people write them: ``1500m`` of cpu, ``3Gi`` of memory, ``2`` of a GPU."""
    if resource == "cpu":
        return f"{count}m" if count % 1000 else str(count // 1000)
    scales = (("Gi", 1024**3), ("Mi", 1024**2), ("Ki", 1024))
    return next((f"{ceil(count / scale)}{name}" for name, scale in scales if count >= 10 * scale), str(count))
