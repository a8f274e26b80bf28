"""Writing files so that they are whole or not there after a crash."""

import os
from pathlib import Path


def write_durably(path: Path, content: bytes | memoryview) -> None:
    """Create or replace ``path`` and wait until its content is on the volume. Not atomic: see ``replace``."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Wait until the names in the directory are on the volume."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, content: bytes) -> None:
    """Replace ``path`` by a file with ``content``, atomically and durably."""
    new = path.with_name(f"{path.name}.new")
    write_durably(new, content)
    new.replace(path)
    sync_directory(path.parent)
