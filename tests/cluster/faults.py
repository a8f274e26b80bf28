"""What can go wrong in the test bed's cluster, for end-to-end tests: dead nodes, other feature gates, bad links, disks.

Each fault is a context manager: inside it holds, afterwards all is well again.

    with faults.dead_node("node-2"): ...
    with faults.feature_gates(RestartAllContainersOnContainerExits=False): ...
    with faults.cut("10.244.1.2", "10.244.2.2"): ...
    with faults.slow("10.244.1.2", "10.244.2.2", "10mbit"): ...
    with faults.small_volume("shared-3", "2m") as volume: volume.resize("8m")
"""

import json
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import commands, control_plane, images, lifecycle, network, settings, volumes
from tests.cluster.errors import ClusterError
from tests.cluster.node import Node

CUT_SET = f"{network.TABLE} cut"
DISCARD_PORT = 9


def node(name: str) -> Node:
    """Return a node of the running cluster by its name."""
    machines = {machine.name: machine for machine in lifecycle.nodes(lifecycle.running().nodes)}
    if name not in machines:
        raise ClusterError(f"no node {name}; there are {', '.join(machines)}")
    return machines[name]


@contextmanager
def dead_node(name: str) -> Iterator[None]:
    """Kill a node with all its pods at once, as a power failure does; start it again afterwards."""
    machine = node(name)
    machine.kill()
    try:
        yield
    finally:
        machine.start(images.seed())


@contextmanager
def silent_kubelet(name: str) -> Iterator[None]:
    """Stop a node's kubelet; its pods run on, unseen."""
    machine = node(name)
    machine.kubelet.stop(signal.SIGKILL)
    try:
        yield
    finally:
        machine.kubelet.start()


@contextmanager
def stopped_api_server() -> Iterator[None]:
    """Kill the API server."""
    plane = lifecycle.control_plane()
    plane.api_server.stop(signal.SIGKILL)
    try:
        yield
    finally:
        plane.api_server.start()


@contextmanager
def feature_gates(**gates: bool) -> Iterator[None]:
    """Restart the API server with other feature gates, and as it was afterwards."""
    plane = lifecycle.control_plane()
    before = plane.configuration.feature_gates
    plane.reconfigure(feature_gates={**before, **gates})
    control_plane.save_configuration(plane.configuration, lifecycle.configuration_file())
    try:
        yield
    finally:
        plane.reconfigure(feature_gates=before)
        control_plane.save_configuration(plane.configuration, lifecycle.configuration_file())


@contextmanager
def cut(first: str, second: str) -> Iterator[None]:
    """Drop every packet between two pod addresses, those of open connections too."""
    pairs = f"{{ {first} . {second}, {second} . {first} }}"
    commands.run("nft", "add", "element", *CUT_SET.split(), pairs)
    try:
        yield
    finally:
        commands.run("nft", "delete", "element", *CUT_SET.split(), pairs)


@dataclass(frozen=True)
class SmallVolume:
    """A file system of its own in the place of a shared volume, on every node."""

    directory: Path
    machines: Sequence[Node]

    def run(self, *argv: str) -> None:
        """Run a command with the volume's directory as its last argument, on all nodes."""
        for machine in self.machines:
            commands.run(*machine.inside(*argv, self.directory))

    def resize(self, size: str) -> None:
        """Change how much it holds."""
        self.run("mount", "--no-mtab", "-o", f"remount,size={size}")

    def allow_writing(self, allowed: bool) -> None:
        """Let nobody but root make or delete anything in it, or everybody."""
        self.run("chmod", "0777" if allowed else "0555")


@contextmanager
def small_volume(name: str, size: str) -> Iterator[SmallVolume]:
    """Put an empty file system of ``size`` (as tmpfs writes it: ``2m``) in the place of a shared volume.

    Each node has one of its own, so the volume's pods must share a node.
    """
    volume = SmallVolume(volumes.ROOT / name, lifecycle.nodes(lifecycle.running().nodes))
    volume.run("mount", "--no-mtab", "-t", "tmpfs", "-o", f"size={size},mode=0777", "tmpfs")
    try:
        yield volume
    finally:
        volume.run("umount", "--no-mtab", "--lazy")


def _hardware_address(address: str) -> str:
    known = json.loads(commands.run("ip", "-json", "neighbour", "show", address, "dev", settings.BRIDGE) or "[]")
    return str(known[0].get("lladdr", "")) if known else ""


def interface_of(address: str) -> str:
    """Return the host's end of the link to a pod.

    Raises:
        ClusterError: no pod answers for the address.

    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.sendto(b"", (address, DISCARD_PORT))  # makes the host ask who has the address
    commands.wait_until(f"a pod answers for {address}", lambda: bool(_hardware_address(address)), seconds=5)
    hardware = _hardware_address(address)
    for entry in json.loads(commands.run("bridge", "-json", "fdb", "show", "br", settings.BRIDGE)):
        if entry["mac"] == hardware:
            return str(entry["ifname"])
    raise ClusterError(f"{address} is at {hardware}, which no link of {settings.BRIDGE} leads to")


@contextmanager
def slow(first: str, second: str, rate: str) -> Iterator[None]:
    """Let no more than ``rate`` (as tc writes it: ``10mbit``) pass in each direction between two pods."""
    ends = [(interface_of(second), first), (interface_of(first), second)]
    try:
        for interface, source in ends:
            # What leaves through the host's end of a link is what the pod receives.
            commands.run("tc", "qdisc", "replace", "dev", interface, "root", "handle", "1:", "htb")
            commands.run(
                *("tc", "class", "replace", "dev", interface, "parent", "1:", "classid", "1:1", "htb", "rate", rate)
            )
            commands.run(
                *("tc", "filter", "replace", "dev", interface, "parent", "1:", "protocol", "ip", "prio", "1"),
                *("u32", "match", "ip", "src", f"{source}/32", "flowid", "1:1"),
            )
        yield
    finally:
        for interface, _ in ends:
            if commands.succeeds("ip", "link", "show", interface):  # a pod may have ended meanwhile
                commands.run("tc", "qdisc", "delete", "dev", interface, "root")
