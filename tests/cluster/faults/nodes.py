"""Whole nodes: without power, without kubelet, drained."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from tests.cluster import binaries, commands, images, lifecycle, settings
from tests.cluster.errors import ClusterError
from tests.cluster.node import Node

DRAIN_SECONDS = 90


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
def drained_node(name: str) -> Iterator[None]:
    """Drain a node, as for its maintenance: its pods are evicted and may leave in good order; open it afterwards."""
    kubectl = (binaries.ensure() / "kubectl", "--kubeconfig", settings.KUBECONFIG)
    try:
        commands.run(
            *(*kubectl, "drain", name, "--ignore-daemonsets", "--delete-emptydir-data", "--force"),
            f"--timeout={DRAIN_SECONDS}s",
        )
        yield
    finally:
        commands.run(*kubectl, "uncordon", name)
