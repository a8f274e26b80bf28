"""Affinity: neighbouring stages prefer to be near each other, by the topology levels of the nodes' labels."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipelinejob_operator.build.names import ATTEMPT_LABEL, JOB_UID_LABEL, PIPELINE_LABEL, STAGE_LABEL

HOST_LEVEL = "kubernetes.io/hostname"
FALLBACK_LEVELS = ("topology.kubernetes.io/zone", HOST_LEVEL)
"""Levels where neither the job nor the installation names any, and the nodes' labels cannot be read."""

HEAVIEST = 100
"""Largest weight that the API allows."""


def near_neighbours(labels: Mapping[str, str], stages: int, levels: Sequence[str]) -> list[dict[str, Any]]:
    """Preferred pod-affinity terms that draw a stage to the stages before and after it in its pipeline.

    ``labels`` are the pod's own; ``levels`` are node labels from the widest domain to the narrowest. One term
    a level, the narrowest weighs most, so a shared host counts more than a shared zone and adds to it.
    """
    stage = int(labels[STAGE_LABEL])
    neighbours = [str(other) for other in (stage - 1, stage + 1) if 0 <= other < stages]
    if not neighbours:
        return []
    selector = {
        "matchLabels": {key: labels[key] for key in (JOB_UID_LABEL, ATTEMPT_LABEL, PIPELINE_LABEL)},
        "matchExpressions": [{"key": STAGE_LABEL, "operator": "In", "values": neighbours}],
    }
    return [
        {
            "weight": HEAVIEST * (depth + 1) // len(levels),
            "podAffinityTerm": {"topologyKey": level, "labelSelector": selector},
        }
        for depth, level in enumerate(levels)
    ]


def together(labels: Mapping[str, str], level: str) -> dict[str, Any]:
    """Required term that keeps all stages of an attempt in one domain of ``level``.

    The scheduler lets the first pod pass, because it matches its own term and no other pod does.
    """
    return {
        "topologyKey": level,
        "labelSelector": {"matchLabels": {key: labels[key] for key in (JOB_UID_LABEL, ATTEMPT_LABEL)}},
    }


def elsewhere(labels: Mapping[str, str]) -> dict[str, Any]:
    """Preferred anti-affinity term that keeps a spare off the nodes of its job's stages, so that both do not die."""
    return {"weight": HEAVIEST, "podAffinityTerm": {"topologyKey": HOST_LEVEL, "labelSelector": _stages(labels)}}


def near_stages(labels: Mapping[str, str], size: int, levels: Sequence[str]) -> list[dict[str, Any]]:
    """Preferred terms that draw a spare to where most of its job's ``size`` stages are, whichever it will replace.

    A node counts a term once for each stage in its domain, so all of them together weigh less than ``elsewhere`` does
    once, as long as there are fewer than 100.
    """
    domains = [level for level in levels if level != HOST_LEVEL]
    weight = max(1, HEAVIEST // (size * len(domains) + 1))
    return [
        {"weight": weight, "podAffinityTerm": {"topologyKey": level, "labelSelector": _stages(labels)}}
        for level in domains
    ]


def _stages(labels: Mapping[str, str]) -> dict[str, Any]:
    """Select the stages of the job of a spare with these labels."""
    return {
        "matchLabels": {JOB_UID_LABEL: labels[JOB_UID_LABEL]},
        "matchExpressions": [{"key": STAGE_LABEL, "operator": "Exists"}],
    }


def avoid(spec: dict[str, Any], nodes: Sequence[str]) -> None:
    """Have a pod prefer any other node to these; where no other is free, one of them is better than none."""
    if not nodes:
        return
    rules = spec.setdefault("affinity", {}).setdefault("nodeAffinity", {})
    # The API takes one name in a list at most.
    fields = [{"key": "metadata.name", "operator": "NotIn", "values": [name]} for name in nodes]
    rules["preferredDuringSchedulingIgnoredDuringExecution"] = [
        *rules.get("preferredDuringSchedulingIgnoredDuringExecution", []),
        {"weight": HEAVIEST, "preference": {"matchFields": fields}},
    ]
