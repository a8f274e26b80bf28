"""Things that are built once: each under a name that holds the hash of all that went into it."""

import fcntl
import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cluster import progress, settings

KEPT_VERSIONS = 2


def digest(*inputs: str | bytes | Path) -> str:
    """Return a short hash of texts and of files' contents."""
    total = hashlib.sha256()
    for item in inputs:
        data = item.read_bytes() if isinstance(item, Path) else item.encode() if isinstance(item, str) else item
        total.update(hashlib.sha256(data).digest())
    return total.hexdigest()[:16]


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Let one process at a time build ``name``; the others wait and then find it built."""
    settings.CACHE.mkdir(parents=True, exist_ok=True)
    with (settings.CACHE / f".{name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.say(f"waiting for another run that holds {lock.name} ...")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def path(kind: str, key: str) -> Path:
    """Return where the thing of this kind and hash is, or will be."""
    return settings.CACHE / f"{kind}-{key}"


def ensure(kind: str, key: str, build: Callable[[Path], None]) -> Path:
    """Return the directory of this kind and hash, having ``build`` fill it when it is not there yet.

    An interrupted build leaves a ``.partial`` directory, which the next one removes: a directory under its
    final name is complete. The two versions used last are kept.
    """
    target = path(kind, key)
    with locked(kind):
        if not target.exists():
            partial = settings.CACHE / f".{kind}-{key}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            build(partial)
            partial.rename(target)
        target.touch()
        versions = sorted(settings.CACHE.glob(f"{kind}-*"), key=lambda p: p.stat().st_mtime, reverse=True)
        for old in versions[KEPT_VERSIONS:]:
            shutil.rmtree(old)
    return target
