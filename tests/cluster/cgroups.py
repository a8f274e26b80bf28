"""The nodes' control groups: where their pods' processes are found, and what ``down`` removes. Versions 1 and 2."""

from pathlib import Path

from tests.cluster import settings
from tests.cluster.errors import ClusterError

ROOT = Path("/sys/fs/cgroup")
CONTROLLERS = ("cpu", "cpuset", "hugetlb", "io", "memory", "pids")


def _unified() -> bool:
    return (ROOT / "cgroup.controllers").exists()


def _roots() -> list[Path]:
    """Return where the cluster's group is, or would be: one place in version 2, one a controller in version 1."""
    hierarchies = [ROOT] if _unified() else [path for path in ROOT.iterdir() if (path / "cgroup.procs").exists()]
    return [hierarchy / settings.CGROUP for hierarchy in hierarchies]


def _delegate(group: Path) -> None:
    offered = (group / "cgroup.controllers").read_text().split()
    for controller in set(CONTROLLERS).intersection(offered):
        try:
            (group / "cgroup.subtree_control").write_text(f"+{controller}")
        except OSError as error:
            raise ClusterError(
                f"control group {group} cannot hand on {controller} ({error.strerror}): the test bed needs a machine,"
                " or a container with a control group of its own"
            ) from error


def create(node: str) -> str:
    """Make the group of a node and return its name as a kubelet knows it."""
    for root in _roots():
        group = root / node
        if _unified():
            root.mkdir(exist_ok=True)
            _delegate(ROOT)
            _delegate(root)
        group.mkdir(parents=True, exist_ok=True)
        if not _unified() and root.parent.name == "cpuset":
            for level in (root, group):  # empty ones can hold no process
                for file in ("cpuset.cpus", "cpuset.mems"):
                    (level / file).write_text((level.parent / file).read_text())
    return f"/{settings.CGROUP}/{node}"


def processes(node: str = "") -> list[int]:
    """Return the processes in a node's group, or in all of the cluster's."""
    pids: set[int] = set()
    for root in _roots():
        for file in (root / node).glob("**/cgroup.procs"):
            pids.update(listed(file.parent))
    return sorted(pids)


def listed(group: Path) -> list[int]:
    """Return the processes in one group."""
    try:
        return [int(line) for line in (group / "cgroup.procs").read_text().split()]
    except OSError:  # the group went away, or is threaded: its domain lists the process
        return []


def of_pod(uid: str) -> list[Path]:
    """Return the groups of a pod's containers that count its memory; the sandbox is one of them."""
    (root,) = (root for root in _roots() if _unified() or root.parent.name == "memory")
    return [file.parent for file in root.glob(f"*/kubepods/**/pod{uid}/*/cgroup.procs")]


def memory_files(group: Path) -> tuple[Path, Path]:
    """Return the files that hold what a group uses, and what it may use, in bytes."""
    if _unified():
        return group / "memory.current", group / "memory.max"
    return group / "memory.usage_in_bytes", group / "memory.limit_in_bytes"


def remove(node: str = "") -> None:
    """Remove the group of a node, or of the cluster, and all below; no process may be left in it."""
    for root in _roots():
        top = root / node
        groups = [path.parent for path in top.glob("**/cgroup.procs")]
        for group in sorted(groups, key=lambda path: len(path.parts), reverse=True):
            group.rmdir()
