"""System packages: what the test bed needs from Debian is installed when it is missing."""

import shutil

from tests.cluster import commands, progress, settings
from tests.cluster.errors import ClusterError

PROGRAMS = {
    "buildah": "buildah",
    "containerd": "containerd",
    "ctr": "containerd",
    "debootstrap": "debootstrap",
    "ip": "iproute2",
    "modprobe": "kmod",
    "mount": "mount",
    "nft": "nftables",
    "nsenter": "util-linux",
    "openssl": "openssl",
    "runc": "runc",
    "skopeo": "skopeo",
    "tar": "tar",
    "tc": "iproute2",
}
"""Program to the Debian package that has it."""


def missing() -> list[str]:
    """Return the packages of the programs that are not on the path."""
    return sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None})


def ensure() -> None:
    """Install what is missing with apt."""
    wanted = missing()
    if not wanted:
        return
    if shutil.which("apt-get") is None:
        raise ClusterError(f"no apt-get here; install {', '.join(wanted)} with your package manager")
    log = settings.CACHE / "log" / "apt.log"
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    with progress.step(f"installing {' '.join(wanted)}", key="apt", usual="about 1 min"):
        commands.run("apt-get", "update", environment=quiet, log=log)
        commands.run("apt-get", "install", "--yes", "--no-install-recommends", *wanted, environment=quiet, log=log)
    if still := missing():
        raise ClusterError(f"apt installed {', '.join(still)}, but its programs are not on the PATH")
