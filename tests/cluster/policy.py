"""NetworkPolicy as nftables rules: a pure function from the cluster's objects to the text that nft reads.

The bridge plugin enforces nothing. All pods are on one bridge whose traffic passes the host's forward hook
(br_netfilter), so rules there decide. Answers to allowed connections pass before these rules. Not forwarded,
hence never refused: what goes to the host itself, which is DNS and the API server, and what comes from it, which
is kubelet probes. Not read: named ports (a warning says so) and IPv6.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from tests.cluster import settings

Object = dict[str, Any]

DIRECTIONS = {"Ingress": ("ingress", "from", "daddr", "saddr"), "Egress": ("egress", "to", "saddr", "daddr")}
"""Policy type to its chain and field, the key of its peers, and the address match of the pods and of the peers."""


def matches(selector: Object | None, labels: dict[str, str]) -> bool:
    """Say whether a label selector selects these labels; the empty selector selects all."""
    selector = selector or {}
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for expression in selector.get("matchExpressions", []):
        key, values = expression["key"], expression.get("values", [])
        holds = {
            "In": key in labels and labels[key] in values,
            "NotIn": key not in labels or labels[key] not in values,
            "Exists": key in labels,
            "DoesNotExist": key not in labels,
        }[expression["operator"]]
        if not holds:
            return False
    return True


def _labels(item: Object) -> dict[str, str]:
    labels: dict[str, str] = item["metadata"].get("labels") or {}
    return labels


def _address(pod: Object) -> str:
    """Return a pod's own address, or "" when it has none to be reached at."""
    status = pod.get("status", {})
    if pod["spec"].get("hostNetwork") or status.get("phase") in ("Succeeded", "Failed"):
        return ""
    return str(status.get("podIP", ""))


def _set(items: Iterable[str]) -> str:
    return "{ " + ", ".join(sorted(set(items))) + " }"


class _Cluster:
    """The pods that have an address, and their namespaces' labels."""

    def __init__(self, pods: Sequence[Object], namespaces: Sequence[Object]) -> None:
        self._pods = [(pod, address) for pod in pods if (address := _address(pod))]
        self._namespaces = {item["metadata"]["name"]: _labels(item) for item in namespaces}

    def select(self, namespace: str, pod_selector: Object | None) -> list[str]:
        """Return the addresses of the pods of one namespace that a selector selects."""
        return [
            address
            for pod, address in self._pods
            if pod["metadata"]["namespace"] == namespace and matches(pod_selector, _labels(pod))
        ]

    def peers(self, policy_namespace: str, peer: Object) -> list[str]:
        """Return the addresses of the pods that a peer of a rule means."""
        if "namespaceSelector" not in peer:
            return self.select(policy_namespace, peer.get("podSelector"))
        return [
            address
            for pod, address in self._pods
            if matches(peer["namespaceSelector"], self._namespaces.get(pod["metadata"]["namespace"], {}))
            and matches(peer.get("podSelector"), _labels(pod))
        ]


def _peer_matches(cluster: _Cluster, namespace: str, peers: list[Object], side: str) -> list[str]:
    """Return the matches of a rule's peers, one of which must hold: "" holds always, no match never."""
    if not peers:
        return [""]
    found, addresses = [], []
    for peer in peers:
        if block := peer.get("ipBlock"):
            excepted = f" ip {side} != {_set(block['except'])}" if block.get("except") else ""
            found.append(f"ip {side} {block['cidr']}{excepted}")
        else:
            addresses += cluster.peers(namespace, peer)
    return found + ([f"ip {side} {_set(addresses)}"] if addresses else [])


def _port_matches(ports: list[Object], warnings: list[str], policy: str) -> list[str]:
    """Return the matches of a rule's ports, one of which must hold: "" holds always, no match never."""
    if not ports:
        return [""]
    found = []
    for port in ports:
        protocol, number = port.get("protocol", "TCP").lower(), port.get("port")
        if number is None:
            found.append(f"meta l4proto {protocol}")
        elif isinstance(number, int):
            last = f"-{port['endPort']}" if "endPort" in port else ""
            found.append(f"{protocol} dport {number}{last}")
        else:
            warnings.append(f"{policy}: named port {number!r} is not enforced by the test bed: nothing passes it")
    return found


def _types(spec: Object) -> list[str]:
    default = ["Ingress", "Egress"] if "egress" in spec else ["Ingress"]
    types: list[str] = spec.get("policyTypes") or default
    return types


def render(policies: Sequence[Object], pods: Sequence[Object], namespaces: Sequence[Object]) -> tuple[str, list[str]]:
    """Return the nft commands that replace the former rules in one transaction, and warnings."""
    cluster = _Cluster(pods, namespaces)
    warnings: list[str] = []
    table = f"inet {settings.NFT_TABLE}"
    lines = [f"flush chain {table} {chain}" for chain in ("isolation", "ingress", "egress")]
    for kind, (chain, peer_key, own_side, peer_side) in DIRECTIONS.items():
        isolated: set[str] = set()
        for policy in policies:
            namespace, spec = policy["metadata"]["namespace"], policy["spec"]
            selected = cluster.select(namespace, spec.get("podSelector"))
            if kind not in _types(spec) or not selected:
                continue
            isolated.update(selected)
            name = f"{namespace}/{policy['metadata']['name']}"
            for rule in spec.get(chain) or []:
                peers = _peer_matches(cluster, namespace, rule.get(peer_key) or [], peer_side)
                ports = _port_matches(rule.get("ports") or [], warnings, name)
                lines += [
                    " ".join(f"add rule {table} {chain} ip {own_side} {_set(selected)} {peer} {port} return".split())
                    for peer in peers
                    for port in ports
                ]
        lines.append(f"add rule {table} {chain} drop")
        if isolated:
            lines.append(f"add rule {table} isolation ip {own_side} {_set(isolated)} jump {chain}")
    return "\n".join(lines) + "\n", warnings
