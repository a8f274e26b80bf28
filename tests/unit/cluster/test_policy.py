"""NetworkPolicy to nftables: who may speak to whom."""

import pytest

from tests.cluster import policy

TABLE = "inet pipelinejob_cluster"


def pod(name: str, address: str, namespace: str = "team", host_network: bool = False, phase: str = "Running", **labels):
    return {
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "spec": {"hostNetwork": host_network},
        "status": {"podIP": address, "phase": phase},
    }


def namespace(name: str, **labels: str):
    return {"metadata": {"name": name, "labels": labels}}


def network_policy(**spec):
    return {"metadata": {"name": "p", "namespace": "team"}, "spec": spec}


PODS = [
    pod("server", "10.244.1.2", app="server"),
    pod("friend", "10.244.2.2", role="friend"),
    pod("other", "10.244.3.2", namespace="other", role="friend"),
    pod("host", "10.244.1.1", host_network=True, role="friend"),
    pod("done", "10.244.2.9", phase="Succeeded", role="friend"),
]
NAMESPACES = [namespace("team", team="a"), namespace("other", team="b")]
SERVER = {"matchLabels": {"app": "server"}}
FRIEND = {"matchLabels": {"role": "friend"}}


def rules(*policies) -> list[str]:
    """The rules that are added, without the table's name."""
    text, warnings = policy.render(policies, PODS, NAMESPACES)
    assert warnings == []
    prefix = f"add rule {TABLE} "
    return [line.removeprefix(prefix) for line in text.splitlines() if line.startswith(prefix)]


def test_without_a_policy_nothing_is_isolated() -> None:
    assert rules() == ["ingress drop", "egress drop"]


def test_former_rules_go_in_the_same_transaction() -> None:
    text, _ = policy.render([], PODS, NAMESPACES)
    assert text.splitlines()[:3] == [f"flush chain {TABLE} {chain}" for chain in ("isolation", "ingress", "egress")]


def test_a_peer_is_a_pod_of_the_policys_namespace() -> None:
    spec = network_policy(podSelector=SERVER, ingress=[{"from": [{"podSelector": FRIEND}]}])
    assert rules(spec) == [
        "ingress ip daddr { 10.244.1.2 } ip saddr { 10.244.2.2 } return",
        "ingress drop",
        "isolation ip daddr { 10.244.1.2 } jump ingress",
        "egress drop",
    ]


@pytest.mark.parametrize(
    ("peer", "addresses"),
    [
        ({"namespaceSelector": {}}, "10.244.1.2, 10.244.2.2, 10.244.3.2"),
        ({"namespaceSelector": {}, "podSelector": FRIEND}, "10.244.2.2, 10.244.3.2"),
        ({"namespaceSelector": {"matchLabels": {"team": "b"}}}, "10.244.3.2"),
        ({"podSelector": {}}, "10.244.1.2, 10.244.2.2"),
    ],
)
def test_peers(peer, addresses: str) -> None:
    spec = network_policy(podSelector=SERVER, ingress=[{"from": [peer]}])
    assert rules(spec)[0] == f"ingress ip daddr {{ 10.244.1.2 }} ip saddr {{ {addresses} }} return"


def test_a_peer_that_selects_no_pod_lets_nobody_in() -> None:
    nobody = {"podSelector": {"matchLabels": {"role": "nobody"}}}
    assert rules(network_policy(podSelector=SERVER, ingress=[{"from": [nobody]}]))[0] == "ingress drop"


def test_a_rule_without_peers_and_ports_lets_all_in() -> None:
    assert rules(network_policy(podSelector=SERVER, ingress=[{}]))[0] == "ingress ip daddr { 10.244.1.2 } return"


@pytest.mark.parametrize(
    ("port", "match"),
    [
        ({"port": 80}, "tcp dport 80"),
        ({"port": 53, "protocol": "UDP"}, "udp dport 53"),
        ({"port": 8000, "endPort": 8010}, "tcp dport 8000-8010"),
        ({"protocol": "UDP"}, "meta l4proto udp"),
    ],
)
def test_ports(port, match: str) -> None:
    spec = network_policy(podSelector=SERVER, ingress=[{"ports": [port]}])
    assert rules(spec)[0] == f"ingress ip daddr {{ 10.244.1.2 }} {match} return"


def test_a_named_port_lets_nothing_pass_and_says_so() -> None:
    spec = network_policy(podSelector=SERVER, ingress=[{"ports": [{"port": "http"}]}])
    text, warnings = policy.render([spec], PODS, NAMESPACES)
    assert "return" not in text
    assert warnings == ["team/p: named port 'http' is not enforced by the test bed: nothing passes it"]


def test_an_address_block_with_an_exception() -> None:
    block = {"ipBlock": {"cidr": "10.244.0.0/16", "except": ["10.244.3.0/24"]}}
    spec = network_policy(podSelector=SERVER, policyTypes=["Egress"], egress=[{"to": [block]}])
    assert rules(spec) == [
        "ingress drop",
        "egress ip saddr { 10.244.1.2 } ip daddr 10.244.0.0/16 ip daddr != { 10.244.3.0/24 } return",
        "egress drop",
        "isolation ip saddr { 10.244.1.2 } jump egress",
    ]


def test_default_deny_isolates_every_pod_of_the_namespace_in_both_directions() -> None:
    assert rules(network_policy(podSelector={}, policyTypes=["Ingress", "Egress"])) == [
        "ingress drop",
        "isolation ip daddr { 10.244.1.2, 10.244.2.2 } jump ingress",
        "egress drop",
        "isolation ip saddr { 10.244.1.2, 10.244.2.2 } jump egress",
    ]


def test_an_egress_section_isolates_egress_without_being_named() -> None:
    spec = network_policy(podSelector=SERVER, egress=[])
    assert "isolation ip saddr { 10.244.1.2 } jump egress" in rules(spec)


@pytest.mark.parametrize(
    ("operator", "values", "selected"),
    [
        ("In", ["a", "b"], ["a"]),
        ("NotIn", ["a"], ["c", None]),
        ("Exists", [], ["a", "c"]),
        ("DoesNotExist", [], [None]),
    ],
)
def test_match_expressions(operator: str, values: list[str], selected: list[str | None]) -> None:
    selector = {"matchExpressions": [{"key": "k", "operator": operator, "values": values}]}
    found = [value for value in ("a", "c", None) if policy.matches(selector, {} if value is None else {"k": value})]
    assert found == selected
