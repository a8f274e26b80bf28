"""The images' base: pulled, or made of Debian packages where no registry can be reached.

``PIPELINEJOB_BASE=debootstrap`` (the default here) makes a stand-in for ``python:3.13-slim-trixie`` with
debootstrap, from the mirror that this machine's apt uses; ``PIPELINEJOB_BASE=pull`` leaves the Containerfiles'
default, which the builder pulls.
"""

import os
import shutil
from pathlib import Path

from tests.cluster import cache, commands, progress, settings
from tests.cluster.builder import Builder
from tests.cluster.errors import ClusterError

CHOICES = ("debootstrap", "pull")
SUITE = "trixie"
PACKAGES = ("ca-certificates", "netbase", "python3", "python3-pip", "tzdata")
CONTAINERFILE = 'FROM scratch\nADD rootfs.tar /\nCMD ["python3"]\n'


def choice() -> str:
    """Return how the base is had: ``debootstrap`` or ``pull``."""
    chosen = os.environ.get("PIPELINEJOB_BASE", CHOICES[0])
    if chosen not in CHOICES:
        raise ClusterError(f"PIPELINEJOB_BASE={chosen}: allowed are {' and '.join(CHOICES)}")
    return chosen


def key() -> str:
    """Return what tells one base from another."""
    return cache.digest(SUITE, *PACKAGES, CONTAINERFILE) if choice() == "debootstrap" else "pull"


def mirror() -> str:
    """Return the address of the Debian archive in this machine's apt sources."""
    listed = commands.run("apt-get", "indextargets", "--format", "$(REPO_URI) $(LABEL)", "Created-By: Packages")
    for line in listed.splitlines():
        address, _, label = line.partition(" ")
        if label == "Debian":
            return address
    raise ClusterError("apt has no Debian archive among its sources; add one, or set PIPELINEJOB_BASE=pull")


def _debootstrap(target: Path, log: Path) -> None:
    root = target / "rootfs"
    commands.run(
        *("debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, root, mirror()),
        log=log,
    )
    for leftover in ("var/cache/apt", "var/lib/apt/lists", "var/log"):
        shutil.rmtree(root / leftover)
        (root / leftover).mkdir()
    (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")
    # The build machine's own mirror is no business of the image's.
    (root / "etc/apt/sources.list").write_text("")
    commands.run("tar", "--create", "--numeric-owner", f"--file={target}/rootfs.tar", f"--directory={root}", ".")
    shutil.rmtree(root)
    (target / "Containerfile").write_text(CONTAINERFILE)


def ensure(builder: Builder) -> str:
    """Return the name of the base image to build upon, or "" for the Containerfiles' default."""
    if choice() == "pull":
        return ""
    name = f"localhost/pipelinejob/base:{key()}"
    log = settings.CACHE / "log" / "base.log"

    def build(target: Path) -> None:
        log.unlink(missing_ok=True)
        with progress.step(f"making a Debian {SUITE} base image", key="base", usual="about 1 min"):
            _debootstrap(target, log)

    root = cache.ensure("base", key(), build)
    if not builder.has(name):
        builder.run("buildah", "build", "--tag", name, root, log=log)
    return name
