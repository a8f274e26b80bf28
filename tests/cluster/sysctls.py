"""Kernel settings: what the cluster changes is written down first and put back by ``down``."""

import json
from contextlib import suppress
from pathlib import Path

from tests.cluster import settings
from tests.cluster.errors import ClusterError

PROC = Path("/proc/sys")
WANTED = {
    "fs/inotify/max_user_instances": "8192",
    "fs/inotify/max_user_watches": "1048576",
    "net/bridge/bridge-nf-call-iptables": "1",
    "net/ipv4/ip_forward": "1",
}
CHANGED_BY_KUBELET = (
    "kernel/keys/root_maxbytes",
    "kernel/keys/root_maxkeys",
    "kernel/panic",
    "kernel/panic_on_oops",
    "vm/overcommit_memory",
    "vm/panic_on_oom",
)
CHANGED_BY_PROXY = ("net/ipv4/conf/all/route_localnet",)


def _record() -> Path:
    return settings.STATE / "sysctls.json"


def apply() -> None:
    """Set what the cluster wants, having recorded once what was there."""
    names = (*WANTED, *CHANGED_BY_KUBELET, *CHANGED_BY_PROXY)
    if not _record().exists():
        before = {name: (PROC / name).read_text().strip() for name in names if (PROC / name).exists()}
        partial = _record().with_suffix(".partial")
        partial.write_text(json.dumps(before, indent=1))
        partial.rename(_record())
    for name, value in WANTED.items():
        current = (PROC / name).read_text().strip() if (PROC / name).exists() else None
        if current is None:
            raise ClusterError(f"this kernel has no setting {name.replace('/', '.')}; it lacks br_netfilter")
        if name.startswith("net/") or int(current) < int(value):
            (PROC / name).write_text(value)


def restore() -> None:
    """Put back what ``apply`` recorded."""
    with suppress(FileNotFoundError):
        for name, value in json.loads(_record().read_text()).items():
            if (PROC / name).read_text().strip() != value:
                (PROC / name).write_text(value)
