"""One node: a containerd and a kubelet in a mount namespace of their own.

Inside the namespace /run, /var/lib and /var/log are fresh, so nodes do not share the places that kubelet and
containerd hard-code; and when the last process of a node has ended, its mounts are gone.
"""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import cgroups, commands, network, processes, settings
from tests.cluster.control_plane import ControlPlane, answers
from tests.cluster.processes import Program

NODES_PER_RACK = 2
NODES_PER_ZONE = 4
RACK_LABEL = "topology.pipelinejob.dev/rack"
PAUSE_IMAGE = "localhost/pipelinejob/pause:1"
CNI_NETWORK = "pipelinejob-cluster"

NAMESPACE_SCRIPT = """
set -eu
scratch=$1 state=$2 run=$3 ready=$4
mount='mount --no-mtab' # its table is in the /run that is replaced
replace() { # make $1 a fresh directory that holds $2 alone
    $mount -t tmpfs tmpfs "$scratch"
    mkdir "$scratch/${2##*/}"
    $mount --bind "$2" "$scratch/${2##*/}"
    $mount --move "$scratch" "$1"
}
$mount -t tmpfs tmpfs /var/log
replace /var/lib "$state"
replace /run "$run"
$mount --make-rshared /
touch "$ready"
exec sleep infinity
"""


def containerd_config(directory: Path, run: Path, cni_plugins: Path) -> str:
    """Return the configuration of a node's containerd."""
    cri = 'plugins."io.containerd.grpc.v1.cri"'
    return f"""version = 2
root = "{directory}/containerd"
state = "{run}/containerd"
disabled_plugins = ["io.containerd.internal.v1.opt"]
[grpc]
  address = "{run}/containerd.sock"
[{cri}]
  sandbox_image = "{PAUSE_IMAGE}"
  # Lowering a process's OOM score needs CAP_SYS_RESOURCE, which a container or a sandboxed machine may lack.
  restrict_oom_score_adj = true
  [{cri}.cni]
    bin_dir = "{cni_plugins}"
    conf_dir = "{directory}/cni"
  [{cri}.containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
"""


def labels(index: int) -> dict[str, str]:
    """Return the topology labels of node ``index``: two nodes a rack, four a zone."""
    return {
        "topology.kubernetes.io/region": "region-1",
        "topology.kubernetes.io/zone": f"zone-{(index - 1) // NODES_PER_ZONE + 1}",
        RACK_LABEL: f"rack-{(index - 1) // NODES_PER_RACK + 1}",
    }


@dataclass(frozen=True)
class Node:
    """Node ``index``, counted from 1. The object holds no state: another run of Python finds the same node."""

    plane: ControlPlane
    index: int

    @property
    def name(self) -> str:
        """Its name in Kubernetes."""
        return settings.node_name(self.index)

    @property
    def directory(self) -> Path:
        """Its disk."""
        return settings.STATE / self.name

    @property
    def run(self) -> Path:
        """Its sockets and what does not outlive a restart of the node."""
        return settings.RUN / self.name

    @property
    def socket(self) -> Path:
        """Where its containerd listens."""
        return self.run / "containerd.sock"

    @property
    def namespace(self) -> Program:
        """The process that holds the mount namespace."""
        ready = self.run / "ready"
        argv = (
            *("unshare", "--mount", "--propagation", "private"),
            *("sh", "-c", NAMESPACE_SCRIPT, "node", self.run / "scratch", settings.STATE, settings.RUN, ready),
        )
        return Program(settings.STATE, f"namespace-{self.name}", argv, ready.exists)

    def inside(self, *argv: str | Path) -> tuple[str | Path, ...]:
        """Return the command that runs ``argv`` with the node's file systems."""
        return ("nsenter", f"--mount=/proc/{self.namespace.pid}/ns/mnt", *argv)

    @property
    def containerd(self) -> Program:
        """The container runtime. It answers on its socket some moments before its CRI service is ready."""
        log = settings.STATE / "log" / f"containerd-{self.name}.log"
        argv = self.inside("containerd", "--config", self.directory / "containerd.toml")
        started = "Start streaming server"
        before = log.read_text(errors="replace").count(started) if log.exists() else 0
        return Program(
            settings.STATE,
            f"containerd-{self.name}",
            argv,
            lambda: log.read_text(errors="replace").count(started) > before,
        )

    @property
    def kubelet(self) -> Program:
        """The kubelet."""
        argv = self.inside(
            self.plane.binaries / "kubelet",
            f"--config={self.directory}/kubelet.json",
            f"--kubeconfig={self.directory}/kubelet.kubeconfig",
            f"--hostname-override={self.name}",
            f"--node-ip={network.node_address(self.index)}",
            f"--node-labels={','.join(f'{key}={value}' for key, value in labels(self.index).items())}",
            f"--root-dir={self.directory}/kubelet",
            f"--cert-dir={self.directory}/certificates",
        )
        url = f"http://{network.node_address(self.index)}:{settings.KUBELET_HEALTH_PORT}/healthz"
        return Program(settings.STATE, f"kubelet-{self.name}", argv, lambda: answers(url))

    def start(self, seed: Path) -> None:
        """Start what does not run. A new node's images are ``seed``'s, shared by hard links."""
        if self.namespace.pid is None:  # as after a boot: what a crash left is in no namespace that can be entered
            self.kill()
            shutil.rmtree(self.run, ignore_errors=True)
        for directory in (self.run / "scratch", self.directory / "cni", self.directory / "kubelet"):
            directory.mkdir(parents=True, exist_ok=True)
        network.add_node(self.index)
        self._clone(seed)
        self._configure()
        self.namespace.start()
        if self.containerd.pid is None:
            self.containerd.start()
        self.kubelet.start()

    def kill(self) -> None:
        """End everything of this node at once, as a power failure would; its disk stays."""
        programs = {f"{kind}-{self.name}" for kind in ("kubelet", "containerd", "namespace")}
        processes.kill_all(lambda: [*cgroups.processes(self.name), *processes.marked(settings.STATE, programs)])
        cgroups.remove(self.name)

    def _clone(self, seed: Path) -> None:
        """Give the node the seed's images: their files never change, so links serve; databases are copied."""
        target = self.directory / "containerd"
        if target.exists():
            return
        partial = self.directory / "containerd.partial"
        shutil.rmtree(partial, ignore_errors=True)
        commands.run("cp", "--archive", "--link", seed / "root", partial)
        for database in partial.glob("*/*.db"):
            database.unlink()
            shutil.copy2(seed / "root" / database.relative_to(partial), database)
        shutil.copy2(seed / "images.json", self.directory / "images.json")
        partial.rename(target)

    def _configure(self) -> None:
        pki, address = self.plane.authority, network.node_address(self.index)
        user = f"system:node:{self.name}"
        pki.kubeconfig(self.directory / "kubelet.kubeconfig", self.plane.server, user, "system:nodes")
        certificate, key = pki.sign(f"kubelet-{self.name}", user, "system:nodes", (f"DNS:{self.name}", f"IP:{address}"))
        cni_plugins = self.plane.binaries / "cni"
        (self.directory / "containerd.toml").write_text(containerd_config(self.directory, self.run, cni_plugins))
        (self.directory / "cni" / "pods.conflist").write_text(json.dumps(self._cni()))
        (self.directory / "kubelet.json").write_text(
            json.dumps(
                {
                    "apiVersion": "kubelet.config.k8s.io/v1beta1",
                    "kind": "KubeletConfiguration",
                    "address": address,
                    "port": settings.KUBELET_PORT,
                    "healthzBindAddress": address,
                    "healthzPort": settings.KUBELET_HEALTH_PORT,
                    "authentication": {
                        "x509": {"clientCAFile": str(pki.certificate)},
                        "anonymous": {"enabled": False},
                    },
                    "authorization": {"mode": "AlwaysAllow"},  # the API server's own client certificate
                    "tlsCertFile": str(certificate),
                    "tlsPrivateKeyFile": str(key),
                    "containerRuntimeEndpoint": f"unix://{self.socket}",
                    "cgroupDriver": "cgroupfs",
                    "cgroupRoot": cgroups.create(self.name),
                    "failCgroupV1": False,
                    "failSwapOn": False,
                    "clusterDNS": [settings.GATEWAY],
                    "clusterDomain": settings.DNS_DOMAIN,
                    "resolvConf": "",
                    "podLogsDir": str(self.directory / "pod-logs"),
                    "volumePluginDir": str(self.directory / "volume-plugins"),
                    "makeIPTablesUtilChains": False,
                    "nodeStatusUpdateFrequency": "4s",
                    "nodeLeaseDurationSeconds": 16,
                    # The nodes share one disk and one memory: none may evict because another fills it.
                    "evictionHard": {
                        "memory.available": "50Mi",
                        "nodefs.available": "0%",
                        "nodefs.inodesFree": "0%",
                        "imagefs.available": "0%",
                    },
                    "imageGCHighThresholdPercent": 100,
                    "featureGates": dict(self.plane.configuration.feature_gates),
                }
            )
        )

    def _cni(self) -> dict[str, object]:
        addresses = {
            "subnet": settings.POD_NETWORK,
            "rangeStart": f"10.244.{self.index}.2",
            "rangeEnd": f"10.244.{self.index}.250",
            "gateway": settings.GATEWAY,
        }
        bridge = {
            "type": "bridge",
            "bridge": settings.BRIDGE,
            "isGateway": False,
            "hairpinMode": True,
            "ipMasq": False,
            "ipam": {
                "type": "host-local",
                "dataDir": str(self.directory / "addresses"),
                "routes": [{"dst": "0.0.0.0/0", "gw": settings.GATEWAY}],
                "ranges": [[addresses]],
            },
        }
        return {"cniVersion": "1.0.0", "name": CNI_NETWORK, "plugins": [bridge]}


def start_all(nodes: list[Node], seed: Path) -> None:
    """Start nodes side by side."""
    with ThreadPoolExecutor(len(nodes)) as pool:
        for started in [pool.submit(node.start, seed) for node in nodes]:
            started.result()
