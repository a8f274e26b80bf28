"""Running other programs: quiet when they succeed, with the end of their output when they fail."""

import os
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from tests.cluster.errors import ClusterError

TAIL_LINES = 25
POLL_SECONDS = 0.05

Argument = str | Path


def tail(log: Path, lines: int = TAIL_LINES) -> str:
    """Return the end of a log, indented, under a line that says where it is."""
    text = log.read_text(errors="replace").splitlines()[-lines:] if log.exists() else []
    return "\n".join([f"the end of {log}:", *(f"    {line}" for line in text)])


def run(
    *argv: Argument,
    log: Path | None = None,
    stdin: str | None = None,
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
) -> str:
    """Run a program to its end and return its standard output.

    With ``log`` the output goes to that file instead, and nothing is returned.

    Raises:
        ClusterError: it does not exist, or did not exit 0; the message ends with what it said.

    """
    words = [str(word) for word in argv]
    sink: IO[str] | int = subprocess.PIPE
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        sink = log.open("a")
    try:
        done = subprocess.run(
            words,
            **({"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}),
            stdout=sink,
            stderr=sink,
            text=True,
            env={**os.environ, **(environment or {})},
            cwd=directory,
            check=False,
        )
    except FileNotFoundError as error:
        raise ClusterError(f"{error.filename}: no such program; install it and run again") from error
    finally:
        if not isinstance(sink, int):
            sink.close()
    if done.returncode == 0:
        return done.stdout or ""
    command = " ".join(words)[:200]
    said = tail(log) if log else (done.stderr or done.stdout).strip()[-2000:]
    raise ClusterError(f"`{command}` exited {done.returncode}: {said}")


def succeeds(*argv: Argument) -> bool:
    """Say whether a program exits 0; its output is dropped."""
    done = subprocess.run([str(word) for word in argv], capture_output=True, check=False)
    return done.returncode == 0


def wait_until(what: str, look: Callable[[], bool], *, seconds: float = 60, log: Path | None = None) -> None:
    """Look until the answer is true.

    Raises:
        ClusterError: it did not come true in time; the message ends with the end of ``log``.

    """
    end = time.monotonic() + seconds
    while not look():
        if time.monotonic() > end:
            said = f"; {tail(log)}" if log else ""
            raise ClusterError(f"{what}: not within {seconds:.0f} s{said}")
        time.sleep(POLL_SECONDS)
