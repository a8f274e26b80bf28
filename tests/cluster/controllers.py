"""What runs once beside etcd and the API server: controller manager, scheduler, kube-proxy and CoreDNS."""

import json
import ssl
from collections.abc import Callable

from tests.cluster import settings
from tests.cluster.control_plane import LOOPBACK, ControlPlane, answers
from tests.cluster.processes import Program

NODE_GRACE = "16s"
"""How long a node may be silent before it is NotReady: four status updates of its kubelet."""

FAST_CLIENT = ("--kube-api-qps=1000", "--kube-api-burst=1000")
"""With simulated nodes: the default rates (20 and 50 a second) would hide the operator's own speed."""


def _serves(port: int, path: str) -> Callable[[], bool]:
    def look() -> bool:
        # These serve health checks over TLS with a certificate that they make up at each start.
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return answers(f"https://{LOOPBACK}:{port}{path}", context)

    return look


def controller_manager(plane: ControlPlane, *, fast: bool) -> Program:
    """Return the controller manager: node lifecycle, endpoints, garbage collection, namespaces, Jobs."""
    pki = plane.authority
    user = "system:kube-controller-manager"
    argv = (
        plane.binaries / "kube-controller-manager",
        f"--kubeconfig={pki.kubeconfig(plane.home / 'controller-manager.kubeconfig', plane.server, user)}",
        f"--bind-address={LOOPBACK}",
        f"--secure-port={settings.CONTROLLER_MANAGER_PORT}",
        f"--root-ca-file={pki.certificate}",
        f"--service-account-private-key-file={pki.account_key}",
        f"--cluster-signing-cert-file={pki.certificate}",
        f"--cluster-signing-key-file={pki.directory / 'ca.key'}",
        "--use-service-account-credentials=true",
        f"--node-monitor-grace-period={NODE_GRACE}",
        f"--flex-volume-plugin-dir={plane.home}/volume-plugins",  # it makes the default one otherwise
        "--leader-elect=false",
        *(FAST_CLIENT if fast else ()),
        *plane.configuration.gate_flags(),
    )
    ready = _serves(settings.CONTROLLER_MANAGER_PORT, "/healthz")
    return Program(plane.home, "kube-controller-manager", argv, ready)


def scheduler(plane: ControlPlane, *, fast: bool, port: int = settings.SCHEDULER_PORT) -> Program:
    """Return the scheduler, whose health is served on ``port``."""
    user = "system:kube-scheduler"
    argv = (
        plane.binaries / "kube-scheduler",
        f"--kubeconfig={plane.authority.kubeconfig(plane.home / 'scheduler.kubeconfig', plane.server, user)}",
        f"--bind-address={LOOPBACK}",
        f"--secure-port={port}",
        "--leader-elect=false",
        *(FAST_CLIENT if fast else ()),
        *plane.configuration.gate_flags(),
    )
    return Program(plane.home, "kube-scheduler", argv, _serves(port, "/healthz"))


def proxy(plane: ControlPlane) -> Program:
    """Return kube-proxy: one for all nodes, since they share the machine's network."""
    kubeconfig = plane.authority.kubeconfig(plane.home / "proxy.kubeconfig", plane.server, "system:kube-proxy")
    config = plane.home / "proxy.json"
    text = json.dumps(
        {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "nftables",
            "clusterCIDR": settings.POD_NETWORK,
            "clientConnection": {"kubeconfig": str(kubeconfig)},
            # Client and server may be on the same bridge: the answer must come back through the host.
            "nftables": {"masqueradeAll": True},
            "nodePortAddresses": [settings.POD_NETWORK],
            # Leave the machine's connection tracking as it is.
            "conntrack": {
                "maxPerCore": 0,
                "min": 0,
                "tcpEstablishedTimeout": "0s",
                "tcpCloseWaitTimeout": "0s",
            },
            "hostnameOverride": settings.node_name(1),
            "healthzBindAddress": f"{LOOPBACK}:{settings.PROXY_HEALTH_PORT}",
            "metricsBindAddress": f"{LOOPBACK}:{settings.PROXY_METRICS_PORT}",
        }
    )
    if not config.exists() or config.read_text() != text:  # kube-proxy ends when its file is written
        config.write_text(text)
    argv = (plane.binaries / "kube-proxy", f"--config={config}")
    url = f"http://{LOOPBACK}:{settings.PROXY_HEALTH_PORT}/livez"
    return Program(plane.home, "kube-proxy", argv, lambda: answers(url))


def dns(plane: ControlPlane) -> Program:
    """Return CoreDNS, on the pods' gateway address: for pods it is host input, which no policy hinders."""
    config = plane.home / "Corefile"
    config.write_text(
        f""".:53 {{
    bind {settings.GATEWAY}
    errors
    ready {LOOPBACK}:{settings.DNS_READY_PORT}
    kubernetes {settings.DNS_DOMAIN} {{
        endpoint {plane.server}
        kubeconfig {plane.kubeconfig}
        ttl 1
    }}
}}
"""
    )
    argv = (plane.binaries / "coredns", "-conf", config)
    url = f"http://{LOOPBACK}:{settings.DNS_READY_PORT}/ready"
    return Program(plane.home, "coredns", argv, lambda: answers(url))
