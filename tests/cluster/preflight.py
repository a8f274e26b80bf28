"""What must hold before anything is started; each refusal is one line that names the cure."""

import ipaddress
import json
import os
import shutil
import socket
import sys
from pathlib import Path

from tests.cluster import commands, settings
from tests.cluster.errors import ClusterError

PORTS = {
    settings.API_PORT: "the API server",
    settings.ETCD_PORT: "etcd",
    settings.ETCD_PEER_PORT: "etcd's peers",
    settings.CONTROLLER_MANAGER_PORT: "the controller manager",
    settings.SCHEDULER_PORT: "the scheduler",
    settings.PROXY_HEALTH_PORT: "kube-proxy's health check",
    settings.PROXY_METRICS_PORT: "kube-proxy's metrics",
    settings.DNS_READY_PORT: "CoreDNS's health check",
}
FIRST_GIB = 40
"""Disk for a first start: programs, base image, the worker image in the builder and in the seed."""
WARM_GIB = 5
MIB = 2**20
HIDDEN_ON_NODES = ("/run", "/var/lib", "/var/log")


def check_host() -> None:
    """Refuse where the test bed cannot work at all."""
    if not sys.platform.startswith("linux"):
        raise ClusterError(f"the test bed needs Linux, and this is {sys.platform}; set KUBECONFIG to a cluster")
    if os.geteuid() != 0:
        raise ClusterError("the test bed starts nodes and networks: run it as root, for instance with sudo -E")
    if any(settings.CACHE.resolve().is_relative_to(hidden) for hidden in HIDDEN_ON_NODES):
        raise ClusterError(
            f"PIPELINEJOB_CACHE={settings.CACHE}: must not be below {', '.join(HIDDEN_ON_NODES)}: nodes have"
            " their own; choose another directory, for instance /var/cache/pipelinejob"
        )


def check_disk(first: bool) -> None:
    """Refuse when the disk is too small, or when cache and state cannot share files by hard links."""
    settings.CACHE.mkdir(parents=True, exist_ok=True)
    if settings.CACHE.stat().st_dev != settings.STATE.parent.stat().st_dev:
        raise ClusterError(
            f"PIPELINEJOB_CACHE={settings.CACHE} and {settings.STATE.parent} are different file systems: nodes"
            " share image files with the cache by hard links; put both on one file system"
        )
    needed, free = FIRST_GIB if first else WARM_GIB, shutil.disk_usage(settings.CACHE).free / 2**30
    if free < needed:
        raise ClusterError(
            f"{settings.CACHE} has {free:.1f} GiB free and the test bed needs {needed}; free some space, or set"
            " PIPELINEJOB_CACHE to a directory on a larger disk"
        )


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return True
    return False


def check_ports() -> None:
    """Refuse when another program listens where the cluster would."""
    for port, user in PORTS.items():
        if _taken(port):
            raise ClusterError(
                f"port {port}, which {user} needs, is taken; `ss -ltnp sport = :{port}` shows by which program"
            )


def check_networks() -> None:
    """Refuse when the pods' or Services' addresses are in use here, or another Kubernetes runs here."""
    for route in json.loads(commands.run("ip", "-json", "-4", "route", "show", "table", "main") or "[]"):
        if route["dst"] == "default" or route.get("dev") == settings.BRIDGE:
            continue
        network = ipaddress.ip_network(route["dst"], strict=False)
        for ours in (settings.POD_NETWORK, settings.SERVICE_NETWORK):
            if network.overlaps(ipaddress.ip_network(ours)):
                raise ClusterError(
                    f"the cluster's network {ours} overlaps the route {network} of {route.get('dev')};"
                    " the test bed cannot run beside that network"
                )
    tables = json.loads(commands.run("nft", "--json", "list", "tables"))["nftables"]
    if any(item.get("table", {}).get("name") == "kube-proxy" for item in tables):
        raise ClusterError(
            "nftables has a table kube-proxy: another Kubernetes node runs on this machine, or did;"
            " run the test bed elsewhere, or remove it with `nft delete table ip kube-proxy`"
        )


def check_memory() -> None:
    """Refuse when there is too little memory for the control plane and a few stage pods."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024 / MIB
    if available < 3000:
        raise ClusterError(
            f"{available:.0f} MiB of memory are available and the test bed needs 3000; stop other programs"
        )
