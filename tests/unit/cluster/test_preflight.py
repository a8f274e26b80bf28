"""Refusals: one line that names the thing, the value and the cure."""

import os
import shutil
import socket
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from tests.cluster import commands, preflight, settings
from tests.cluster.errors import ClusterError

Usage = namedtuple("Usage", "total used free")


def refusal(check, *arguments: object) -> str:
    with pytest.raises(ClusterError) as caught:
        check(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_another_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert refusal(preflight.check_host).startswith("the test bed needs Linux, and this is darwin")


def test_not_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "run it as root" in refusal(preflight.check_host)


def test_a_cache_that_nodes_cannot_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(settings, "CACHE", Path("/var/lib/x"))
    assert refusal(preflight.check_host).startswith("PIPELINEJOB_CACHE=/var/lib/x: must not be below /run, /var/lib")


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(preflight, "PORTS", {port: "the API server"})
        assert refusal(preflight.check_ports) == (
            f"port {port}, which the API server needs, is taken; `ss -ltnp sport = :{port}` shows by which program"
        )
    preflight.check_ports()


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(settings, "CACHE", tmp_path)
    monkeypatch.setattr(settings, "STATE", tmp_path / "state")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 7 * 2**30))
    assert f"has 7.0 GiB free and the test bed needs {preflight.FIRST_GIB}" in refusal(preflight.check_disk, True)
    preflight.check_disk(False)


@pytest.mark.parametrize("network", ["10.244.8.0/24", "10.0.0.0/8", "10.96.0.0/12"])
def test_a_network_in_use(network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    routes = f'[{{"dst": "default", "dev": "eth0"}}, {{"dst": "{network}", "dev": "eth0"}}]'
    monkeypatch.setattr(commands, "run", lambda *_: routes)
    assert f"overlaps the route {network} of eth0" in refusal(preflight.check_networks)


def test_another_kubernetes_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"ip": "[]", "nft": '{"nftables": [{"table": {"family": "ip", "name": "kube-proxy"}}]}'}
    monkeypatch.setattr(commands, "run", lambda program, *_: answers[program])
    assert "another Kubernetes" in refusal(preflight.check_networks)
