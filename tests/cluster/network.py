"""The pods' bridge, the nodes' addresses on it, and the cluster's own nftables table."""

import subprocess
from pathlib import Path

from tests.cluster import commands, settings, sysctls

MODULES = ("br_netfilter", "nf_conntrack", "nf_tables", "overlay", "veth")
TABLE = f"inet {settings.NFT_TABLE}"
GUARDED_PORTS = f"{settings.API_PORT}, {settings.KUBELET_PORT}"
BASE_RULES = f"""
table {TABLE} {{
    # Pairs of addresses that a test has cut off from each other: see faults/links.py.
    set cut {{ type ipv4_addr . ipv4_addr; }}
    # Network policies, kept by the agent: see policy.py.
    chain ingress {{ }}
    chain egress {{ }}
    chain isolation {{ }}
    chain forward {{
        type filter hook forward priority filter; policy accept;
        ip saddr . ip daddr @cut drop
        ct state established,related accept
        jump isolation
    }}
    # The cluster is for this machine alone.
    chain input {{
        type filter hook input priority filter; policy accept;
        iifname {{ "lo", "{settings.BRIDGE}" }} accept
        tcp dport {{ {GUARDED_PORTS} }} drop
    }}
}}
"""


def node_address(index: int) -> str:
    """Return the address of node ``index``: its kubelet listens there."""
    return f"10.244.{index}.1"


def up() -> None:
    """Make bridge, routes, kernel settings and table, or what of them is missing."""
    for module in MODULES:
        # A kernel may have them built in, and a container may have no modprobe rights: what is
        # really missing shows at the first use, by name.
        subprocess.run(["modprobe", "--quiet", module], check=False)
    if not commands.succeeds("ip", "link", "show", settings.BRIDGE):
        commands.run("ip", "link", "add", settings.BRIDGE, "type", "bridge")
    prefix = settings.POD_NETWORK.rpartition("/")[2]
    commands.run("ip", "address", "replace", f"{settings.GATEWAY}/{prefix}", "dev", settings.BRIDGE)
    commands.run("ip", "link", "set", settings.BRIDGE, "up")
    # Without a default route the host itself would have no way to a Service's address.
    commands.run("ip", "route", "replace", settings.SERVICE_NETWORK, "dev", settings.BRIDGE)
    sysctls.apply()
    if not commands.succeeds("nft", "list", "table", *TABLE.split()):
        commands.run("nft", "--file", "-", stdin=BASE_RULES)


def add_node(index: int) -> None:
    """Give node ``index`` its address on the bridge."""
    commands.run("ip", "address", "replace", f"{node_address(index)}/32", "dev", settings.BRIDGE)


def down() -> None:
    """Remove the bridge, with addresses and routes, and the tables of the cluster and of its kube-proxy."""
    if Path("/sys/class/net", settings.BRIDGE).exists():
        commands.run("ip", "link", "delete", settings.BRIDGE)
    # Ours goes last: while it is there, kube-proxy's are ours too, since a start refuses a machine that has some.
    if commands.succeeds("nft", "list", "table", *TABLE.split()):
        for table in ("ip kube-proxy", "ip6 kube-proxy", TABLE):
            if commands.succeeds("nft", "list", "table", *table.split()):
                commands.run("nft", "delete", "table", *table.split())
    sysctls.restore()
