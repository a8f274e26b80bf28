"""Rules of ``spec.recovery``: which one speaks about a failure, or about a node."""

import signal
from collections.abc import Mapping, Sequence

from pipelinejob_operator.api.recovery import Rule
from pipelinejob_operator.policy.facts import Failure

SIGNAL_BASE = 128
"""Exit code of a process that a signal ended, less the signal's number."""


def matching(rules: Sequence[Rule], failure: Failure) -> Rule | None:
    """Return the first rule that matches how a stage ended: every list that is set must hold its part of it."""
    return next((rule for rule in rules if not rule.on_node_conditions and _matches(rule, failure)), None)


def _matches(rule: Rule, failure: Failure) -> bool:
    seen = (
        (rule.on_exit_codes, failure.exit_code),
        (rule.on_signals, signal_name(failure.exit_code)),
        (rule.on_reasons, failure.reason),
    )
    return all(value in wanted for wanted, value in seen if wanted)


def signal_name(exit_code: int) -> str:
    """Name of the signal that an exit code tells of; empty where it tells of none."""
    try:
        return signal.Signals(exit_code - SIGNAL_BASE).name
    except ValueError:
        return ""


def about_node(rules: Sequence[Rule], node: str, conditions: Mapping[str, frozenset[str]]) -> tuple[Rule, str] | None:
    """Return the first rule that a node's conditions meet, and which one; ``conditions``: those that are True."""
    for rule in rules:
        for kind in rule.on_node_conditions:
            if kind in conditions.get(node, frozenset()):
                return rule, kind
    return None
