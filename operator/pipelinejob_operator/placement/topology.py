"""Nodes and the tree of domains they stand in, from the manifests of nodes and pods. Pure."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipelinejob_operator.placement.affinity import HOST_LEVEL
from pipelinejob_operator.placement.fit import UNSCHEDULABLE, Node, Taint
from pipelinejob_operator.placement.pods import PORT_PREFIX, Manifest, holds_room, node_of, requests
from pipelinejob_operator.placement.quantity import amount

BASE = 10_000
"""Default weights grow by this factor a level, so that one crossing of a wider level outweighs all of the narrower
ones together: no job has as many links."""

REGION, ZONE = "topology.kubernetes.io/region", "topology.kubernetes.io/zone"

FABRICS: tuple[tuple[str, ...], ...] = (
    # https://docs.nvidia.com/topograph/reference/node-labels-and-annotations: releases from 1.0 (tiers count outwards
    # from the node and are found by their prefix), then the ones before.
    ("fabric.topograph.run/tier-*", "accelerator.topograph.run/domain", "accelerator.topograph.run/sub-domain"),
    (
        "network.topology.nvidia.com/tier-*",
        "network.topology.nvidia.com/core",
        "network.topology.nvidia.com/datacenter",
        "network.topology.nvidia.com/spine",
        "network.topology.nvidia.com/leaf",
        "network.topology.nvidia.com/block",
        "network.topology.nvidia.com/accelerator",
    ),
    # https://docs.aws.amazon.com/eks/latest/userguide/ml-workload-topology.html: the last is nearest.
    (*(f"topology.k8s.aws/network-node-layer-{layer}" for layer in (1, 2, 3, 4)), "topology.k8s.aws/ultraserver-id"),
    # https://cloud.google.com/ai-hypercomputer/docs/workloads/schedule-gke-workloads-tas
    (*(f"cloud.google.com/gce-topology-{name}" for name in ("block", "subblock", "host")),),
    # https://github.com/oracle-quickstart/oci-hpc-oke, docs on RDMA network locality.
    (*(f"oci.oraclecloud.com/rdma.{name}_id" for name in ("hpc_island", "network_block", "local_block")),),
    # https://docs.coreweave.com/products/networking/hpc-interconnect/infiniband-roce-labels
    (
        "backend.coreweave.cloud/fabric",
        "ib.coreweave.cloud/superpod",
        "backend.coreweave.cloud/leafgroup",
        "node.coreweave.cloud/rack",
    ),
)
"""Labels that describe one fabric, from the widest domain to the narrowest."""


class TopologyError(ValueError):
    """The levels cannot be used; the message names the level and the cure."""


@dataclass(frozen=True, slots=True)
class Level:
    """A level of the tree. ``weight`` is the cost of a link that leaves a domain of this level, and no wider one."""

    label: str
    weight: int


Path = tuple[str, ...]
"""The domains of a node from the widest level to the host, one a level: the label's value, and the node's name last."""


def levels(labels: Sequence[str], weights: Sequence[int] = ()) -> tuple[Level, ...]:
    """Levels for ``labels``, widest first; the host is always the last and need not be given.

    ``weights`` has one number for each level with the host's; without it, one crossing of a level costs more than all
    that are possible below. Raises TopologyError for labels given twice, for a level below the host, and for weights
    that do not fall from the widest level to the host: the plan is exact only because a domain's inside is nearer than
    its outside.
    """
    names = [*labels] if HOST_LEVEL in labels else [*labels, HOST_LEVEL]
    if names[-1] != HOST_LEVEL:
        raise TopologyError(f"topologyLevels: {names[-1]} is narrower than a host; {HOST_LEVEL} must be the last level")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise TopologyError(f"topologyLevels: Duplicate value: {twice[0]}; give each level once")
    given = [*weights] or [BASE ** (len(names) - 1 - depth) for depth in range(len(names))]
    if len(given) != len(names) or sorted(given, reverse=True) != given or given[-1] < 1 or given[0] >= 1 << 128:
        raise TopologyError(
            f"weights: Invalid value: {given} for the levels {', '.join(names)}; allowed: one whole number a level, "
            "none larger than the one before, the last at least 1"
        )
    return tuple(Level(name, weight) for name, weight in zip(names, given, strict=True))


def choose_labels(override: Sequence[str], configured: Sequence[str], nodes: Iterable[Node]) -> tuple[str, ...]:
    """The job's own levels, else the installation's, else those that the nodes' labels show.

    Raises TopologyError when the job names a level that no node has.
    """
    nodes = tuple(nodes)
    for name in override:
        if name != HOST_LEVEL and not any(name in node.labels for node in nodes):
            raise TopologyError(
                f"spec.placement.topologyLevels: Invalid value: no node has the label {name}; "
                f"label the nodes, or use what they have: {', '.join(detect(nodes)) or 'no known level'}"
            )
    return tuple(override) or tuple(configured) or detect(nodes)


def detect(nodes: Iterable[Node]) -> tuple[str, ...]:
    """Region and zone where nodes have them, then the fabric of ``FABRICS`` that most nodes have labels of."""
    count = Counter(label for node in nodes for label in node.labels)
    fabrics = [[label for pattern in fabric for label in _known(pattern, count)] for fabric in FABRICS]
    fabric = max(fabrics, key=lambda labels: max((count[label] for label in labels), default=0))
    return (*(label for label in (REGION, ZONE) if label in count), *fabric)


def _known(pattern: str, present: Mapping[str, int]) -> list[str]:
    if not pattern.endswith("*"):
        return [pattern] if pattern in present else []
    tiers = [match for label in present if (match := re.fullmatch(re.escape(pattern[:-1]) + r"(\d{1,3})", label))]
    return [match[0] for match in sorted(tiers, key=lambda match: int(match[1]), reverse=True)]


def path(node: Node, tree: Sequence[Level]) -> Path:
    """Where ``node`` stands.

    A node without the label of a level is a domain of its own there: nothing is known to be near it, so nothing is
    assumed, and a job that fits on it alone can still have it. Its name stands in brackets, which no label value has.
    """
    return (*(node.labels.get(level.label) or f"({node.name})" for level in tree[:-1]), node.name)


def read_nodes(
    nodes: Iterable[Manifest], pods: Iterable[Manifest], counts: Callable[[Manifest], bool] = holds_room
) -> tuple[Node, ...]:
    """Nodes by name, each with what is free after all ``pods`` that are bound, nominated or pinned to it.

    ``counts`` says which pods take room; a planner leaves out those that it is about to move.
    """
    taken: dict[str, Counter[str]] = {}
    for pod in pods:
        name = node_of(pod)
        if name is not None and counts(pod):
            taken.setdefault(name, Counter()).update(requests(pod))
    read = (read_node(item, taken.get(item["metadata"]["name"], {})) for item in nodes)
    return tuple(sorted(read, key=lambda node: node.name))


def read_node(manifest: Manifest, used: Mapping[str, int]) -> Node:
    """The node of ``manifest``, of which pods take ``used``."""
    metadata, spec, status = manifest["metadata"], manifest.get("spec") or {}, manifest.get("status") or {}
    taints = [Taint(item["key"], item.get("value") or "", item["effect"]) for item in spec.get("taints") or []]
    if spec.get("unschedulable") and not any(taint.key == UNSCHEDULABLE for taint in taints):
        taints.append(Taint(UNSCHEDULABLE, "", "NoSchedule"))
    offered = {key: amount(key, value) for key, value in (status.get("allocatable") or {}).items()}
    ports = {key: 1 - count for key, count in used.items() if key.startswith(PORT_PREFIX)}
    dead = any(item["type"] == "Ready" and item["status"] != "True" for item in status.get("conditions") or [])
    return Node(
        name=metadata["name"],
        labels=metadata.get("labels") or {},
        free={**{key: value - used.get(key, 0) for key, value in offered.items()}, **ports},
        taints=tuple(taints),
        leaving="deletionTimestamp" in metadata,
        avoided="not ready" if dead else "",
    )
