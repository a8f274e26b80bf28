"""Names, places, addresses and ports of the test bed. One cluster a machine, so they are constants."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

CACHE = Path(os.environ.get("PIPELINEJOB_CACHE", "/var/cache/pipelinejob"))
"""What is built once and kept, by content hash of its inputs."""

STATE = Path("/var/lib/pipelinejob-cluster")
"""The cluster's own files: keys, logs, etcd, the nodes' disks. ``down`` removes it."""

RUN = Path("/run/pipelinejob-cluster")
"""Sockets and the runtimes' transient state. ``down`` removes it."""

KUBECONFIG = STATE / "admin.kubeconfig"

KUBERNETES_VERSION = "1.37.2"

BRIDGE = "pipelinejob0"
POD_NETWORK = "10.244.0.0/16"
GATEWAY = "10.244.0.1"
"""The host's address on the pods' bridge: where pods find the API server, and CoreDNS listens."""

SIMULATED_POD_NETWORK = "10.245.0.0/16"
"""Addresses that simulated pods show; nothing is there."""

SERVICE_NETWORK = "10.96.0.0/16"
API_SERVICE = "10.96.0.1"
DNS_DOMAIN = "cluster.local"

API_PORT = 6443
ETCD_PORT = 2379
ETCD_PEER_PORT = 2380
CONTROLLER_MANAGER_PORT = 10257
SCHEDULER_PORT = 10259
PROXY_HEALTH_PORT = 10256
PROXY_METRICS_PORT = 10249
DNS_READY_PORT = 8181
KWOK_PORT = 10247
KUEUE_HEALTH_PORT = 10246
KUEUE_WEBHOOK_PORT = 10245
KUBELET_PORT = 10250
KUBELET_HEALTH_PORT = 10248
"""The kubelet of node n listens on 10.244.n.1."""

MAX_NODES = 60
"""Each node owns 10.244.n.2 to 10.244.n.250."""

NFT_TABLE = "pipelinejob_cluster"
CGROUP = "pipelinejob-cluster"


def node_name(index: int) -> str:
    """Return the name of node ``index``, counted from 1."""
    return f"node-{index}"
