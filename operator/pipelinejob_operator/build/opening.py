"""Opening a pod's scheduling gate: one patch that removes the gate and, for a planned stage, pins the node.

While a pod is gated the API server lets its node affinity grow narrower and nothing else: terms may be given where
there were none, and each term that is there may get more requirements (KEP-3838). A term without requirements matches
no node and must stay as it is.
"""

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pipelinejob_operator.build.names import GATE, OPENED_ANNOTATION

Manifest = dict[str, Any]

PROVISION, DYNAMIC_RESOURCES = "Provision", "DynamicResources"


class Opened(BaseModel):
    """What the operator notes on a pod when it opens the gate."""

    model_config = ConfigDict(frozen=True)

    at: datetime
    node: str = ""
    """The node that the pod is pinned to; empty where kube-scheduler chooses."""
    why: str = ""
    """Why it is not pinned: ``PROVISION`` or ``DYNAMIC_RESOURCES``."""

    @classmethod
    def read(cls, text: str | None) -> "Opened | None":
        """Read the annotation; None where there is none, or where somebody has spoilt it."""
        try:
            return cls.model_validate(json.loads(text)) if text else None
        except (ValueError, ValidationError):
            return None


@dataclass(frozen=True)
class Opening:
    """A gate to open."""

    name: str
    uid: str
    operations: tuple[Manifest, ...]
    """JSON patch; it fails where the gate is open already."""


def opening(pod: Manifest, note: Opened) -> Opening:
    """Patch that opens the gate of ``pod`` (as admitted) and pins it to ``note.node`` if there is one."""
    meta, spec = pod["metadata"], pod["spec"]
    gates = [gate["name"] for gate in spec.get("schedulingGates", [])]
    path = f"/spec/schedulingGates/{gates.index(GATE)}"
    escaped = OPENED_ANNOTATION.replace("/", "~1")
    operations: list[Manifest] = [
        {"op": "test", "path": "/metadata/uid", "value": meta["uid"]},
        {"op": "test", "path": f"{path}/name", "value": GATE},
        {"op": "add", "path": f"/metadata/annotations/{escaped}", "value": note.model_dump_json(exclude_defaults=True)},
    ]
    if note.node:
        operations.append(
            {"op": "add", "path": "/spec/affinity", "value": pinned(spec.get("affinity") or {}, note.node)}
        )
    operations.append({"op": "remove", "path": path})
    return Opening(meta["name"], meta["uid"], tuple(operations))


def pinned(affinity: Manifest, node: str) -> Manifest:
    """``affinity`` that admits ``node`` alone, and only if it did so before."""
    field = {"key": "metadata.name", "operator": "In", "values": [node]}
    by_node = affinity.get("nodeAffinity") or {}
    required = by_node.get("requiredDuringSchedulingIgnoredDuringExecution") or {}
    terms = [_narrowed(term, field) for term in required.get("nodeSelectorTerms") or [{"matchFields": []}]]
    narrowed = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
    return affinity | {"nodeAffinity": by_node | narrowed}


def _narrowed(term: Manifest, field: Manifest) -> Manifest:
    if "matchFields" not in term and not term.get("matchExpressions"):
        return term
    return term | {"matchFields": [*(term.get("matchFields") or []), field]}
