"""Which nodes a pod may run on: taints, cordon, node selector and node affinity, as kube-scheduler reads them. Pure."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pipelinejob_operator.placement.pods import PORT_PREFIX, Manifest, requests

UNSCHEDULABLE = "node.kubernetes.io/unschedulable"
_KEEPS_AWAY = ("NoSchedule", "NoExecute")
_WHOLE = re.compile(r"[+-]?\d{1,19}")


@dataclass(frozen=True, slots=True)
class Taint:
    """A taint of a node."""

    key: str
    value: str
    effect: str

    def __str__(self) -> str:
        return f"{self.key}{'=' if self.value else ''}{self.value}:{self.effect}"


@dataclass(frozen=True, slots=True)
class Node:
    """A node as far as placement is concerned: ``free`` is allocatable less what pods on it ask for."""

    name: str
    labels: Mapping[str, str]
    free: Mapping[str, int]
    taints: tuple[Taint, ...] = ()
    leaving: bool = False
    avoided: str = ""
    """Why no stage may come for now, whatever it tolerates; empty if it may."""


@dataclass(frozen=True, slots=True)
class Toleration:
    """A toleration of a pod; an empty key or effect matches all."""

    key: str
    operator: str
    value: str
    effect: str

    def tolerates(self, taint: Taint) -> bool:
        """Whether it answers ``taint``; an operator unknown here answers none."""
        if self.effect not in ("", taint.effect) or self.key not in ("", taint.key):
            return False
        return self.operator == "Exists" or (self.operator == "Equal" and self.value == taint.value)


@dataclass(frozen=True, slots=True)
class Expression:
    """A requirement on a label, or on the field ``metadata.name``."""

    key: str
    operator: str
    values: tuple[str, ...]

    def holds(self, values: Mapping[str, str]) -> bool:
        """Whether ``values`` meet it; raises ValueError for an operator that Kubernetes does not have."""
        value = values.get(self.key)
        match self.operator:
            case "In":
                return value is not None and value in self.values
            case "NotIn":
                return value is None or value not in self.values
            case "Exists":
                return value is not None
            case "DoesNotExist":
                return value is None
            case "Gt" | "Lt":
                limit = self.values[0] if len(self.values) == 1 else ""
                if value is None or not _WHOLE.fullmatch(value) or not _WHOLE.fullmatch(limit):
                    return False
                return int(value) > int(limit) if self.operator == "Gt" else int(value) < int(limit)
        raise ValueError(
            f"node affinity: Unsupported value: operator {self.operator!r} of {self.key}; "
            "allowed: In, NotIn, Exists, DoesNotExist, Gt, Lt"
        )


@dataclass(frozen=True, slots=True)
class Term:
    """Expressions that must all hold; an empty term matches no node."""

    labels: tuple[Expression, ...]
    fields: tuple[Expression, ...]

    def matches(self, node: Node) -> bool:
        """Whether ``node`` meets every expression."""
        return bool(self.labels or self.fields) and (
            all(item.holds(node.labels) for item in self.labels)
            and all(item.holds({"metadata.name": node.name}) for item in self.fields)
        )


@dataclass(frozen=True, slots=True)
class Demand:
    """What a stage's pod asks of a node. Stages with equal demands are interchangeable."""

    requests: tuple[tuple[str, int], ...]
    node_selector: tuple[tuple[str, str], ...] = ()
    selectors: tuple[tuple[Term, ...], ...] = field(default=())
    """Every one must hold, by at least one of its terms: the pod's node affinity and those of its volumes."""
    tolerations: tuple[Toleration, ...] = ()

    def refusal(self, node: Node) -> str | None:
        """Why the pod may not run on ``node`` whatever room it has, in words that group nodes; None if it may."""
        if node.leaving:
            return "being deleted"
        if node.avoided:
            return node.avoided
        for taint in node.taints:
            if taint.effect in _KEEPS_AWAY and not any(item.tolerates(taint) for item in self.tolerations):
                return "cordoned" if taint.key == UNSCHEDULABLE else f"tainted {taint}"
        if any(node.labels.get(key) != value for key, value in self.node_selector):
            return "not selected by nodeSelector"
        if not all(any(term.matches(node) for term in terms) for terms in self.selectors):
            return "not selected by node affinity"
        return None

    def room(self, free: Mapping[str, int]) -> int:
        """How many such pods fit into ``free``."""
        return max(0, min(available(free, name) // count for name, count in self.requests))


def available(free: Mapping[str, int], resource: str) -> int:
    """How much of ``resource`` there is; a host port that nobody uses is there once."""
    return free.get(resource, 1 if resource.startswith(PORT_PREFIX) else 0)


def demand(pod: Manifest, volumes: Iterable[Manifest] = ()) -> Demand:
    """The demand of ``pod`` as admitted.

    ``volumes`` are the ``nodeAffinity.required`` of the bound persistent volumes that it mounts.
    """
    spec = pod.get("spec") or {}
    affinity = ((spec.get("affinity") or {}).get("nodeAffinity") or {}).get(
        "requiredDuringSchedulingIgnoredDuringExecution"
    )
    return Demand(
        requests=tuple(sorted(requests(pod).items())),
        node_selector=tuple(sorted((spec.get("nodeSelector") or {}).items())),
        selectors=tuple(_terms(item) for item in (affinity, *volumes) if item is not None),
        tolerations=tuple(
            Toleration(
                item.get("key") or "",
                item.get("operator") or "Equal",
                item.get("value") or "",
                item.get("effect") or "",
            )
            for item in spec.get("tolerations") or []
        ),
    )


def _terms(selector: Manifest) -> tuple[Term, ...]:
    return tuple(
        Term(_expressions(term.get("matchExpressions") or []), _expressions(term.get("matchFields") or []))
        for term in selector.get("nodeSelectorTerms") or []
    )


def _expressions(items: Sequence[Manifest]) -> tuple[Expression, ...]:
    return tuple(Expression(item["key"], item["operator"], tuple(item.get("values") or ())) for item in items)
