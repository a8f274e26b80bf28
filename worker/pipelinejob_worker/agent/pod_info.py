"""The files of the downward-API volume: the job's configuration and the membership.

The kubelet replaces them atomically, by a symbolic link, so a file is read as a whole or is of before. It
offers no notification that works on every node, so they are polled.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TypeVar

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.protocol import (
    CONFIG_FILE,
    MEMBERSHIP_FILE,
    PROTOCOL_VERSION,
    Membership,
    WorkerConfig,
)

Document = TypeVar("Document", WorkerConfig, Membership)

POLL_SECONDS = 0.2
LIMIT_BYTES = 1 << 20
"""Nothing here can be longer: annotations of a pod have 256 KiB in all."""


async def config(directory: Path) -> WorkerConfig:
    """Wait for the configuration and return it. Raises ConfigurationError as ``parse`` does."""
    while not (text := _read(directory / CONFIG_FILE)):  # noqa: ASYNC110 - a file tells nobody that it has come
        await asyncio.sleep(POLL_SECONDS)
    return parse(WorkerConfig, "configuration", text)


async def memberships(directory: Path, place: tuple[int, int] | None) -> AsyncIterator[Membership]:
    """Yield the membership whenever its epoch has grown, for ever. Raises as ``newer_membership`` does."""
    seen = 0
    while True:
        membership = newer_membership(_read(directory / MEMBERSHIP_FILE), place, seen)
        if membership:
            seen = membership.epoch
            yield membership
        await asyncio.sleep(POLL_SECONDS)


def newer_membership(text: str, place: tuple[int, int] | None, seen_epoch: int) -> Membership | None:
    """Return the membership that ``text`` holds, or None when it is empty or not newer than ``seen_epoch``.

    Raises ConfigurationError as ``parse`` does, or when it is of another stage and pipeline than ``place``; without
    one a pod may get another stage with each epoch.
    """
    if not text.strip():
        return None
    membership = parse(Membership, "membership", text)
    if membership.epoch <= seen_epoch:
        return None
    if place and (membership.stage, membership.pipeline) != place:
        stage, pipeline = place
        raise ConfigurationError(
            f"membership: is of stage {membership.stage} of pipeline {membership.pipeline}; allowed: this pod's stage "
            f"{stage} of pipeline {pipeline}; delete the pod, the operator makes a new one"
        )
    return membership


def parse(kind: type[Document], what: str, text: str) -> Document:
    """Read a document of the operator's.

    Raises ConfigurationError when it is not valid, or is too new for this image: what is not understood must not be
    left out in silence.
    """
    try:
        oldest = json.loads(text).get("oldestReader", 1)
        if oldest > PROTOCOL_VERSION:
            raise ConfigurationError(
                f"{what}: needs protocol {oldest} or newer; this worker image has {PROTOCOL_VERSION}; use one of the "
                "operator's release"
            )
        return kind.model_validate_json(text)
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{what}: not valid: {_one_line(error)}") from error


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(LIMIT_BYTES)
    except FileNotFoundError:
        return ""


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
