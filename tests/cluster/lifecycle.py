"""Up, load, status and down: the order in which the rooms are used."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.cluster import (
    binaries,
    cache,
    commands,
    controllers,
    images,
    kwok,
    network,
    node,
    packages,
    preflight,
    progress,
    settings,
    teardown,
    volumes,
)
from tests.cluster import (
    gpus as gpu_resource,
)
from tests.cluster.agent import READY as AGENT_READY
from tests.cluster.api import Api, Object
from tests.cluster.control_plane import Addresses, Configuration, ControlPlane, load_configuration, save_configuration
from tests.cluster.errors import ClusterError
from tests.cluster.node import Node
from tests.cluster.processes import Program, pid_of

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
READY_SECONDS = 120
ZONE_LABEL = "topology.kubernetes.io/zone"


@dataclass(frozen=True)
class Cluster:
    """What a cluster was started with."""

    nodes: int
    gpus: int
    simulated: int
    boot: str

    @staticmethod
    def file() -> Path:
        """Return where it is kept."""
        return settings.STATE / "cluster.json"

    @classmethod
    def read(cls) -> "Cluster | None":
        """Return the cluster of this machine, or None; what an earlier boot left is none."""
        if not cls.file().exists():
            return None
        kept = cls(**json.loads(cls.file().read_text()))
        return kept if kept.boot == BOOT_ID.read_text().strip() else None

    def write(self) -> None:
        """Keep it."""
        partial = self.file().with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self)))
        partial.rename(self.file())


def configuration_file() -> Path:
    """Return where the API server's present configuration is kept."""
    return settings.STATE / "configuration.json"


def control_plane() -> ControlPlane:
    """Return the control plane of the cluster, in the configuration it has at this moment."""
    kept = configuration_file()
    return ControlPlane(
        settings.STATE,
        configuration=load_configuration(kept) if kept.exists() else Configuration(),
        addresses=Addresses(
            bind="0.0.0.0",
            advertise=settings.GATEWAY,
            api_port=settings.API_PORT,
            etcd_port=settings.ETCD_PORT,
            etcd_peer_port=settings.ETCD_PEER_PORT,
            service_network=settings.SERVICE_NETWORK,
            further=(settings.API_SERVICE,),
        ),
        controllers=True,
    )


def agent(gpus: int) -> Program:
    """Return the test bed's own controller."""
    argv = (sys.executable, "-m", "tests.cluster.agent", f"--gpus={gpus}")
    path = {"PYTHONPATH": str(settings.REPOSITORY)}
    return Program(settings.STATE, "agent", argv, AGENT_READY.exists, path)


def _fresh_agent(gpus: int) -> Program:
    """Return the agent, an earlier one being ended: its number of GPUs may be another."""
    program = agent(gpus)
    program.stop()
    AGENT_READY.unlink(missing_ok=True)
    return program


def nodes(count: int) -> list[Node]:
    """Return the first ``count`` nodes."""
    plane = control_plane()
    return [Node(plane, index) for index in range(1, count + 1)]


def _check(count: int, before: Cluster | None) -> None:
    preflight.check_host()
    if not 1 <= count <= settings.MAX_NODES:
        raise ClusterError(f"NODES={count}: allowed are 1 to {settings.MAX_NODES}")
    if before and before.nodes > count:
        raise ClusterError(f"NODES={count}: {before.nodes} nodes run already; `make cluster-down` first")
    preflight.check_disk(first=not images.seed().exists())
    packages.ensure()
    if before is None:
        if settings.STATE.exists():
            progress.say("removing what an interrupted run or an earlier boot left")
        teardown.down()
        preflight.check_networks()
        preflight.check_ports()
        preflight.check_memory()


def _is_ready(item: Object, gpus: int) -> bool:
    status = item["status"]
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions", []))
    return ready and int(status.get("allocatable", {}).get(gpu_resource.RESOURCE, 0)) == gpus


def _ready_nodes(api: Api, gpus: int) -> int:
    return sum(_is_ready(item, gpus) for item in api.request("GET", "/api/v1/nodes")["items"])


def up(count: int, gpus: int, simulated: int) -> None:
    """Start the cluster, or what of it does not run, and print how to use it."""
    with cache.locked("cluster"):
        before = Cluster.read()
        _check(count, before)
        binaries.ensure()
        with progress.step(f"cluster of {count} nodes"):
            settings.STATE.mkdir(parents=True, exist_ok=True)
            settings.RUN.mkdir(parents=True, exist_ok=True)
            Cluster(count, gpus, simulated, BOOT_ID.read_text().strip()).write()
            seed = images.ensure_seed()
            _start(count, gpus, simulated, seed)
    progress.say(f"export KUBECONFIG={settings.KUBECONFIG}")


def _start(count: int, gpus: int, simulated: int, seed: Path) -> None:
    network.up()
    plane = control_plane()
    with progress.step("  control plane"):
        plane.start()
        save_configuration(plane.configuration, configuration_file())
        once = [
            controllers.controller_manager(plane, fast=simulated > 0),
            controllers.scheduler(plane, fast=simulated > 0),
            controllers.proxy(plane),
            controllers.dns(plane),
            _fresh_agent(gpus),
            *([kwok.program(plane)] if simulated else []),
        ]
        for program in once:
            program.launch()
    with progress.step("  nodes"):
        machines = nodes(count)
        node.start_all(machines, seed)
        for machine in machines:
            images.load(machine)
    api = Api()
    with progress.step("  ready"):
        volumes.create(api)
        kwok.create_nodes(api, simulated, gpus)
        for program in once:
            program.wait()
        commands.wait_until(
            f"{count + simulated} nodes Ready with {gpus} GPUs each",
            lambda: _ready_nodes(api, gpus) >= count + simulated,
            seconds=READY_SECONDS,
            log=machines[0].kubelet.log,
        )


def load() -> None:
    """Build the images whose inputs changed, and bring all nodes up to them."""
    with cache.locked("cluster"):
        cluster = running()
        images.ensure_seed()
        for machine in nodes(cluster.nodes):
            images.load(machine)


def running() -> Cluster:
    """Return the cluster that runs on this machine.

    Raises:
        ClusterError: none does.

    """
    cluster = Cluster.read()
    if cluster is None:
        raise ClusterError("no cluster runs on this machine; start one with `make cluster-up`")
    return cluster


def status() -> None:
    """Print the programs and the nodes."""
    cluster = running()
    for pid_file in sorted((settings.STATE / "pids").iterdir()):
        pid = pid_of(settings.STATE, pid_file.name)
        progress.say(f"{pid_file.name:<28} {f'runs ({pid})' if pid else 'DOES NOT RUN'}")
    kubectl = (binaries.ensure() / "kubectl", "--kubeconfig", settings.KUBECONFIG)
    columns = f"--label-columns={ZONE_LABEL},{node.RACK_LABEL}"
    progress.say(commands.run(*kubectl, "get", "nodes", columns))
    progress.say(f"{cluster.nodes} nodes, {cluster.gpus} GPUs each, {cluster.simulated} simulated nodes")
    progress.say(f"export KUBECONFIG={settings.KUBECONFIG}")


def prepare() -> None:
    """Build and install all that a start needs, and start nothing."""
    preflight.check_host()
    with cache.locked("cluster"):
        preflight.check_disk(first=not images.seed().exists())
        packages.ensure()
        binaries.ensure()
        settings.RUN.mkdir(parents=True, exist_ok=True)
        images.ensure_seed()
        teardown.down()


def down() -> None:
    """Take the cluster down; nothing is left of it but the cache."""
    preflight.check_host()
    with cache.locked("cluster"), progress.step("taking the cluster down"):
        teardown.down()
