"""Combinations of settings such that every pair of values of any two settings occurs in one of them."""

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any


def all_pairs(settings: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Cover all pairs greedily; always the same combinations for the same settings."""
    names = list(settings)
    missing = {
        ((one, a), (other, b))
        for one, other in combinations(names, 2)
        for a, b in product(settings[one], settings[other])
    }
    chosen = []
    while missing:
        best = min(missing, key=str)
        row = dict(best)
        for name in names:
            if name not in row:
                row[name] = max(settings[name], key=lambda value: len(_pairs(row | {name: value}, names) & missing))
        missing -= _pairs(row, names)
        chosen.append({name: row[name] for name in names})
    return chosen


def _pairs(row: Mapping[str, Any], names: Sequence[str]) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    return {
        ((one, row[one]), (other, row[other])) for one, other in combinations(names, 2) if one in row and other in row
    }
