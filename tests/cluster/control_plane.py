"""etcd and a kube-apiserver: a real control plane, for integration tests and for the whole cluster.

    from tests.cluster.control_plane import ControlPlane

    with ControlPlane(tmp_path) as plane:
        kubectl = plane.binaries / "kubectl"          # built on first use, cached
        plane.kubeconfig                              # Path; cluster administrator
        plane.server                                  # "https://127.0.0.1:PORT"
        plane.api_server.stop(); plane.api_server.start()            # an orderly restart
        plane.api_server.stop(signal.SIGKILL)                        # a crash; likewise plane.etcd
        plane.reconfigure(feature_gates={"RestartAllContainersOnContainerExits": False})

Ports are free ones unless given, so several can run side by side; they stay the same over restarts, and so do
the objects. There are no controllers: nothing makes service accounts, deletes dependents or finishes the
deletion of a namespace (the ServiceAccount admission plugin is off, so pods can be created nevertheless).
"""

import json
import signal
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType

from tests.cluster import binaries, processes
from tests.cluster.pki import Authority
from tests.cluster.processes import Program

LOOPBACK = "127.0.0.1"
ANSWER_SECONDS = 2
WITHOUT_CONTROLLERS = (
    "--disable-admission-plugins=ServiceAccount",
    "--endpoint-reconciler-type=none",  # it refuses a loopback address
)
SERVER_NAMES = ("kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost")


def free_port() -> int:
    """Return a TCP port of the loopback address that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def answers(url: str, context: ssl.SSLContext | None = None) -> bool:
    """Say whether a GET of this loopback URL is answered with 200."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        with opener.open(url, timeout=ANSWER_SECONDS) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@dataclass(frozen=True)
class Addresses:
    """Where the control plane listens, and where it says it does."""

    bind: str = LOOPBACK
    advertise: str = LOOPBACK
    api_port: int = field(default_factory=free_port)
    etcd_port: int = field(default_factory=free_port)
    etcd_peer_port: int = field(default_factory=free_port)
    service_network: str = "10.96.0.0/16"
    further: tuple[str, ...] = ()
    """Further IP addresses in the API server's certificate."""


@dataclass(frozen=True)
class Configuration:
    """What a test may want otherwise in the API server."""

    feature_gates: Mapping[str, bool] = field(default_factory=dict)
    runtime_config: tuple[str, ...] = ()
    """For instance ``("scheduling.k8s.io/v1beta1=true",)``."""
    arguments: tuple[str, ...] = ()
    """Further arguments, verbatim."""

    def gate_flags(self) -> tuple[str, ...]:
        """Return the argument that sets the feature gates, if there are any."""
        gates = ",".join(f"{name}={str(on).lower()}" for name, on in sorted(self.feature_gates.items()))
        return (f"--feature-gates={gates}",) if gates else ()

    def flags(self) -> tuple[str, ...]:
        """Return the arguments of the API server that say this."""
        return (
            *self.gate_flags(),
            *((f"--runtime-config={','.join(self.runtime_config)}",) if self.runtime_config else ()),
            *self.arguments,
        )


class ControlPlane:
    """etcd and a kube-apiserver in a directory of their own; see the module's text for how to use it."""

    def __init__(
        self,
        home: Path,
        *,
        configuration: Configuration | None = None,
        addresses: Addresses | None = None,
        controllers: bool = False,
    ) -> None:
        self.home = home.resolve()
        self.binaries = binaries.ensure()
        self.addresses = addresses or Addresses()
        self.authority = Authority(self.home / "pki")
        self.kubeconfig = self.home / "admin.kubeconfig"
        self.server = f"https://{LOOPBACK}:{self.addresses.api_port}"
        self._controllers = controllers
        self.configuration = configuration or Configuration()

    @property
    def etcd(self) -> Program:
        """The store. Writes are not flushed to disk: it survives its own crash, not the machine's."""
        client = f"http://{LOOPBACK}:{self.addresses.etcd_port}"
        peer = f"http://{LOOPBACK}:{self.addresses.etcd_peer_port}"
        argv = (
            self.binaries / "etcd",
            f"--data-dir={self.home}/etcd",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync",
            "--log-level=warn",
        )
        return Program(self.home, "etcd", argv, lambda: answers(f"{client}/readyz"))

    @property
    def api_server(self) -> Program:
        """The API server, with the configuration of this moment."""
        where, pki = self.addresses, self.authority
        certificate, key = self._serving_certificate()
        kubelet_certificate, kubelet_key = pki.sign("kubelet-client", "kube-apiserver", "system:masters")
        argv = (
            self.binaries / "kube-apiserver",
            f"--etcd-servers=http://{LOOPBACK}:{where.etcd_port}",
            f"--bind-address={where.bind}",
            f"--secure-port={where.api_port}",
            f"--advertise-address={where.advertise}",
            f"--service-cluster-ip-range={where.service_network}",
            f"--tls-cert-file={certificate}",
            f"--tls-private-key-file={key}",
            f"--client-ca-file={pki.certificate}",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            *(() if self._controllers else WITHOUT_CONTROLLERS),
            "--allow-privileged=true",
            f"--service-account-key-file={pki.account_public_key}",
            f"--service-account-signing-key-file={pki.account_key}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--kubelet-client-certificate={kubelet_certificate}",
            f"--kubelet-client-key={kubelet_key}",
            f"--kubelet-certificate-authority={pki.certificate}",
            "--kubelet-preferred-address-types=InternalIP",
            *self.configuration.flags(),
        )
        context = ssl.create_default_context(cafile=str(pki.certificate))
        return Program(self.home, "kube-apiserver", argv, lambda: answers(f"{self.server}/readyz", context))

    def _serving_certificate(self) -> tuple[Path, Path]:
        where = self.addresses
        ips = dict.fromkeys((LOOPBACK, where.advertise, *where.further))
        names = (*(f"DNS:{name}" for name in SERVER_NAMES), *(f"IP:{ip}" for ip in ips))
        return self.authority.sign("kube-apiserver", "kube-apiserver", addresses=names)

    def start(self) -> None:
        """Start both, or what of them does not run, and wait until the API server is ready.

        Raises:
            ClusterError: a program cannot be built or does not answer; the message ends with its log.

        """
        self.home.mkdir(parents=True, exist_ok=True)
        self.authority.create()
        self.authority.kubeconfig(self.kubeconfig, self.server, "admin", "system:masters")
        self.etcd.start()
        self.api_server.start()

    def stop(self) -> None:
        """End both; the data stay."""
        for name in ("kube-apiserver", "etcd"):
            processes.stop(self.home, name)

    def reconfigure(self, **changes: object) -> None:
        """Restart the API server with other members of ``Configuration``; objects and ports stay.

        It is killed: an orderly stop would wait for every open watch, up to a minute.
        """
        self.api_server.stop(signal.SIGKILL)
        self.configuration = replace(self.configuration, **changes)  # type: ignore[arg-type]
        self.api_server.start()

    def __enter__(self) -> "ControlPlane":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def save_configuration(configuration: Configuration, target: Path) -> None:
    """Keep a configuration for a later run of Python."""
    target.write_text(
        json.dumps(
            {
                "feature_gates": dict(configuration.feature_gates),
                "runtime_config": configuration.runtime_config,
                "arguments": configuration.arguments,
            }
        )
    )


def load_configuration(source: Path) -> Configuration:
    """Read what ``save_configuration`` kept."""
    kept = json.loads(source.read_text())
    return Configuration(kept["feature_gates"], tuple(kept["runtime_config"]), tuple(kept["arguments"]))
