"""What the reader sees: one line a step, with its duration now and the time before."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tests.cluster import settings

REMINDER_SECONDS = 30


def say(text: str) -> None:
    """Print one line at once."""
    print(text, flush=True)


def _durations() -> dict[str, float]:
    with suppress(FileNotFoundError, json.JSONDecodeError):
        kept: dict[str, float] = json.loads((settings.CACHE / "durations.json").read_text())
        return kept
    return {}


def _remember(key: str, seconds: float) -> None:
    settings.CACHE.mkdir(parents=True, exist_ok=True)
    target = settings.CACHE / "durations.json"
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps({**_durations(), key: round(seconds, 1)}, indent=1, sort_keys=True))
    partial.replace(target)


def _span(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


@contextmanager
def step(what: str, *, key: str = "", usual: str = "") -> Iterator[None]:
    """Announce a step and say how long it took.

    ``key`` names a long step whose duration is kept in the cache and told at the next run; ``usual`` is what
    to expect the first time. A long step says every half minute that it still runs.
    """
    if key:
        last = _durations().get(key)
        expect = f"took {_span(last)} last time" if last is not None else f"first time on this machine; {usual}"
        say(f"{what} ({expect}) ...")
    started = time.monotonic()
    ended = threading.Event()

    def remind() -> None:
        while not ended.wait(REMINDER_SECONDS):
            say(f"  {what}: {_span(time.monotonic() - started)} so far")

    reminder = threading.Thread(target=remind, daemon=True)
    if key:
        reminder.start()
    try:
        yield
    finally:
        ended.set()
    seconds = time.monotonic() - started
    say(f"{what}: {_span(seconds)}")
    if key:
        _remember(key, seconds)


def fail(text: str) -> None:
    """Print the reason for which the command ends."""
    print(f"error: {text}", file=sys.stderr, flush=True)
