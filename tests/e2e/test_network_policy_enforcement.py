"""The test bed enforces NetworkPolicy: what the other tests show under default-deny would be worth nothing else."""

from collections.abc import Iterator

import pytest

from tests.e2e import kit

SERVER = "import http.server as h; h.ThreadingHTTPServer(('', {port}), h.SimpleHTTPRequestHandler).serve_forever()"
CONNECT = "import socket; socket.create_connection(('{address}', {port}), timeout=1)"
DENY_ALL = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def pod(name: str, command: str, **labels: str) -> kit.Object:
    """A pod of the worker image that runs a line of Python."""
    container = {
        "name": "python",
        "image": kit.WORKER_IMAGE,
        "command": ["python3", "-c", command],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    spec = {
        "terminationGracePeriodSeconds": 0,
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 65532,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name, **labels}},
        "spec": spec,
    }


def policy(name: str, **spec: object) -> kit.Object:
    """A NetworkPolicy."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name},
        "spec": spec,
    }


class Peers:
    """A server on ports 8000 and 8001, and pods that try to reach it."""

    def __init__(self, namespace: kit.Namespace) -> None:
        self.namespace = namespace
        both = f"import threading; threading.Thread(target=lambda: exec({SERVER.format(port=8001)!r})).start(); "
        namespace.apply(
            pod("server", both + SERVER.format(port=8000)),
            pod("friend", "import time; time.sleep(1e6)", role="friend"),
            pod("stranger", "import time; time.sleep(1e6)"),
        )
        kit.kubectl("wait", "pod", "--all", "-n", namespace.name, "--for=condition=Ready", "--timeout=60s")
        self.address = kit.get("pod", "server", "-n", namespace.name)["status"]["podIP"]
        for port in (8000, 8001):
            kit.wait_for(f"the server listens on {port}", lambda port=port: self.reaches("friend", port))

    def reaches(self, name: str, port: int = 8000) -> bool:
        """Whether a pod can open a connection to the server."""
        connect = CONNECT.format(address=self.address, port=port)
        said = kit.kubectl(
            "exec", name, "-n", self.namespace.name, "--", "python3", "-c", f"{connect}; print('yes')", check=False
        )
        if said.strip() == "yes":
            return True
        assert "TimeoutError" in said, said  # a policy drops: nothing else may be the reason
        return False


@pytest.fixture
def peers() -> Iterator[Peers]:
    """The server and its peers, in a namespace of their own."""
    with kit.namespace("network-policy") as made:
        yield Peers(made)


def test_only_the_allowed_peer_and_port_pass(peers: Peers) -> None:
    assert peers.reaches("stranger")

    ingress = [{"from": [{"podSelector": {"matchLabels": {"role": "friend"}}}], "ports": [{"port": 8000}]}]
    peers.namespace.apply(policy("server", podSelector={"matchLabels": {"app": "server"}}, ingress=ingress))

    kit.wait_for("the stranger is refused", lambda: not peers.reaches("stranger"))
    assert peers.reaches("friend")
    assert not peers.reaches("friend", port=8001)

    kit.kubectl("delete", "networkpolicy", "server", "-n", peers.namespace.name)
    kit.wait_for("the stranger passes again", lambda: peers.reaches("stranger"))


def test_default_deny_needs_both_directions_allowed(peers: Peers) -> None:
    peers.namespace.apply(policy("deny", **DENY_ALL))
    kit.wait_for("nobody passes", lambda: not peers.reaches("friend"))

    to_server = [{"to": [{"podSelector": {"matchLabels": {"app": "server"}}}]}]
    peers.namespace.apply(policy("out", podSelector={}, policyTypes=["Egress"], egress=to_server))
    assert not peers.reaches("friend")

    from_here = [{"from": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"role": "friend"}}}]}]
    peers.namespace.apply(policy("in", podSelector={"matchLabels": {"app": "server"}}, ingress=from_here))
    kit.wait_for("the friend passes", lambda: peers.reaches("friend"))
    assert not peers.reaches("stranger")


def test_a_pod_that_comes_later_is_refused_too(peers: Peers) -> None:
    peers.namespace.apply(policy("server", podSelector={"matchLabels": {"app": "server"}}, ingress=[]))
    kit.wait_for("the friend is refused", lambda: not peers.reaches("friend"))

    late = [{"from": [{"podSelector": {"matchLabels": {"role": "late"}}}]}]
    peers.namespace.apply(policy("late", podSelector={"matchLabels": {"app": "server"}}, ingress=late))
    peers.namespace.apply(
        pod("late", "import time; time.sleep(1e6)", role="late"), pod("later", "import time; time.sleep(1e6)")
    )
    kit.kubectl("wait", "pod", "--all", "-n", peers.namespace.name, "--for=condition=Ready", "--timeout=60s")
    kit.wait_for("the late pod is known", lambda: peers.reaches("late"))
    assert not peers.reaches("later")
