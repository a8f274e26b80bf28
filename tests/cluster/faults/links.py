"""Links between pods: cut, or slow."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from tests.cluster import commands, network, settings
from tests.cluster.errors import ClusterError

CUT_SET = f"{network.TABLE} cut"
DISCARD_PORT = 9


@contextmanager
def cut(first: str, second: str) -> Iterator[None]:
    """Drop every packet between two pod addresses, those of open connections too."""
    pairs = f"{{ {first} . {second}, {second} . {first} }}"
    commands.run("nft", "add", "element", *CUT_SET.split(), pairs)
    try:
        yield
    finally:
        commands.run("nft", "delete", "element", *CUT_SET.split(), pairs)


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
