"""What the cluster has and what is taken: all nodes, and what every pod takes of them, whoever made it.

Kept current like the cache: watch, re-list and the operator's own writes may come in any order, and each object only
moves forward. Of a pod only its sums are kept, but for the stage pods that wait behind their gate: those are kept as
admitted, because plans are made from them. The sums of a node are kept up to date, so a plan does not add up the pods
of the whole cluster.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pipelinejob_operator.build.names import GATE, JOB_UID_LABEL, MANAGED_BY, MANAGED_BY_LABEL
from pipelinejob_operator.placement.fit import Node
from pipelinejob_operator.placement.pods import holds_room, node_of, requests
from pipelinejob_operator.placement.topology import detect, read_node
from pipelinejob_operator.runtime.cache import REMEMBERED_DELETIONS

Manifest = dict[str, Any]
Amounts = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class _Taken:
    """What one pod takes of the node that it is bound to, nominated for or pinned to."""

    version: int
    node: str
    amounts: tuple[tuple[str, int], ...]
    job: str
    """UID of the PipelineJob whose stage it is; empty for all other pods."""


class Inventory:
    """Nodes and the sums of their pods. Not thread-safe: one event loop uses it."""

    def __init__(self) -> None:
        self.more_room: Callable[[], None] = lambda: None
        """Called when a node may have room that it did not have before."""
        self._nodes: dict[str, Manifest] = {}
        self._pods: dict[str, _Taken] = {}
        self._used: dict[str, Counter[str]] = {}
        self._held: dict[str, Counter[str]] = {}
        self._gated: dict[str, dict[str, Manifest]] = {}
        self._built: dict[str, Node] = {}
        self._detected: tuple[str, ...] | None = None
        self._deleted: OrderedDict[str, None] = OrderedDict()
        self.layouts = 0
        """Grows whenever a node comes, changes or goes, whatever runs on it."""
        self.gains = 0
        """Grows whenever there may be more room; a gang that found none finds none until it has."""

    def manifests(self) -> tuple[Manifest, ...]:
        """All nodes by name, as far as placement is concerned with them."""
        return tuple(self._nodes[name] for name in sorted(self._nodes))

    def nodes(self) -> tuple[Node, ...]:
        """All nodes by name, each with what is free of it now."""
        for name in self._nodes.keys() - self._built.keys():
            self._built[name] = read_node(self._nodes[name], self._used.get(name, {}))
        return tuple(self._built[name] for name in sorted(self._built))

    def held(self) -> dict[str, Amounts]:
        """What stage pods of any job hold, by node."""
        return {name: dict(amounts) for name, amounts in self._held.items()}

    def node(self, name: str) -> Node | None:
        """One node."""
        return read_node(self._nodes[name], self._used.get(name, {})) if name in self._nodes else None

    def detected_levels(self) -> tuple[str, ...]:
        """The topology levels that the nodes' labels show."""
        if self._detected is None:
            self._detected = detect(self.nodes())
        return self._detected

    def gated(self) -> Mapping[str, Mapping[str, Manifest]]:
        """The stage pods that wait behind our gate, as admitted, by their job's UID and their own."""
        return self._gated

    def put_node(self, manifest: Manifest) -> None:
        """Take over a node."""
        meta = manifest["metadata"]
        old = self._nodes.get(meta["name"])
        if meta["uid"] in self._deleted or (old and _version(old) >= _version(manifest)):
            return
        trimmed = _trim_node(manifest)
        self._nodes[meta["name"]] = trimmed
        if old is None or _facts(old) != _facts(trimmed):  # the heartbeats of a node change nothing
            self._changed(meta["name"])
            self._detected = None
            self.layouts += 1
            self._gain()

    def drop_node(self, name: str, uid: str) -> None:
        """Forget a deleted node, unless another one has taken its name."""
        self._remember_deletion(uid)
        if name in self._nodes and self._nodes[name]["metadata"]["uid"] == uid:
            del self._nodes[name]
            self._changed(name)
            self._detected = None
            self.layouts += 1

    def put_pod(self, manifest: Manifest) -> None:
        """Take over a pod."""
        uid, version = manifest["metadata"]["uid"], _version(manifest)
        old = self._pods.get(uid)
        if uid in self._deleted or (old and old.version >= version):
            return
        node = (node_of(manifest) if holds_room(manifest) else None) or ""
        labels = manifest["metadata"].get("labels") or {}
        ours = labels.get(JOB_UID_LABEL, "") if labels.get(MANAGED_BY_LABEL) == MANAGED_BY else ""
        amounts = tuple(sorted(requests(manifest).items())) if node else ()
        self._pods[uid] = new = _Taken(version, node, amounts, ours)
        self._account(old, new)
        if ours:
            self._keep_gated(ours, uid, manifest)

    def drop_pod(self, uid: str) -> None:
        """Forget a deleted pod."""
        self._remember_deletion(uid)
        if old := self._pods.pop(uid, None):
            self._account(old, None)
            self._forget_gated(old.job, uid)

    def keep_nodes(self, uids: Collection[str], version: int) -> int:
        """Drop the nodes that a whole list as of ``version`` lacks; return how many."""
        held = [(name, node["metadata"]["uid"], _version(node)) for name, node in self._nodes.items()]
        lost = [(name, uid) for name, uid, seen in held if uid not in uids and seen <= version]
        for name, uid in lost:
            self.drop_node(name, uid)
        return len(lost)

    def keep_pods(self, uids: Collection[str], version: int) -> int:
        """Drop the pods that a whole list as of ``version`` lacks; return how many."""
        lost = [uid for uid, held in self._pods.items() if uid not in uids and held.version <= version]
        for uid in lost:
            self.drop_pod(uid)
        return len(lost)

    def _account(self, old: _Taken | None, new: _Taken | None) -> None:
        if old and new and (old.node, old.amounts) == (new.node, new.amounts):
            return
        for taken, sign in ((old, -1), (new, 1)):
            if taken is None or not taken.node:
                continue
            for sums in (self._used, self._held) if taken.job else (self._used,):
                node = sums.setdefault(taken.node, Counter())
                for name, count in taken.amounts:
                    node[name] += sign * count
                    if not node[name]:
                        del node[name]
                if not node:
                    del sums[taken.node]
            self._changed(taken.node)
        if old and old.node:
            self._gain()

    def _keep_gated(self, job: str, uid: str, manifest: Manifest) -> None:
        meta, spec = manifest["metadata"], manifest["spec"]
        gates = [gate["name"] for gate in spec.get("schedulingGates") or ()]
        if GATE not in gates or "deletionTimestamp" in meta:
            self._forget_gated(job, uid)
            return
        kept = {key: meta[key] for key in ("name", "namespace", "uid", "labels")}
        self._gated.setdefault(job, {})[uid] = {"metadata": kept, "spec": spec}

    def _forget_gated(self, job: str, uid: str) -> None:
        pods = self._gated.get(job, {})
        if pods.pop(uid, None) and not pods:
            del self._gated[job]
            self._gain()  # what was reserved for it may be given to others

    def _changed(self, node: str) -> None:
        self._built.pop(node, None)

    def _gain(self) -> None:
        self.gains += 1
        self.more_room()

    def _remember_deletion(self, uid: str) -> None:
        self._deleted[uid] = None
        if len(self._deleted) > REMEMBERED_DELETIONS:
            self._deleted.popitem(last=False)


def _trim_node(manifest: Manifest) -> Manifest:
    meta, spec, status = manifest["metadata"], manifest.get("spec") or {}, manifest.get("status") or {}
    kept = ("name", "uid", "resourceVersion", "labels", "deletionTimestamp")
    ready = [
        {"type": item["type"], "status": item["status"]}
        for item in status.get("conditions") or ()
        if item["type"] == "Ready"
    ]
    return {
        "metadata": {key: meta[key] for key in kept if key in meta},
        "spec": {key: spec[key] for key in ("taints", "unschedulable") if key in spec},
        "status": {"allocatable": status.get("allocatable") or {}, "conditions": ready},
    }


def _facts(node: Manifest) -> tuple[Any, ...]:
    meta = node["metadata"]
    return meta.get("labels"), "deletionTimestamp" in meta, node["spec"], node["status"]


def _version(manifest: Manifest) -> int:
    return int(manifest["metadata"]["resourceVersion"])
