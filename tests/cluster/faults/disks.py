"""Volumes that are full, or forbid writing."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import commands, lifecycle, volumes
from tests.cluster.node import Node


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
    def filled(self) -> Iterator[None]:
        """Let others' data take all the space."""
        try:
            self.run("sh", "-c", 'cat /dev/zero > "$0/others" || true')
            yield
        finally:
            self.run("sh", "-c", 'rm "$0/others"')


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
