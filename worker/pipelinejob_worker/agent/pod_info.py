"""The files of the downward-API volume: the job's configuration and the membership.

The kubelet replaces them atomically, by a symbolic link, so a file is read as a whole or is of before. It
offers no notification that works on every node, so they are polled.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

from pydantic import ValidationError

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.protocol import (
    CONFIG_FILE,
    MEMBERSHIP_FILE,
    PROTOCOL_VERSION,
    Membership,
    WorkerConfig,
)

POLL_SECONDS = 0.2
LIMIT_BYTES = 1 << 20
"""Nothing here can be longer: annotations of a pod have 256 KiB in all."""


async def config(directory: Path) -> WorkerConfig:
    """Wait for the configuration and return it. Raises ConfigurationError when it is not valid."""
    while not (text := _read(directory / CONFIG_FILE)):  # noqa: ASYNC110 - a file tells nobody that it has come
        await asyncio.sleep(POLL_SECONDS)
    try:
        return WorkerConfig.model_validate_json(text)
    except ValidationError as error:
        raise ConfigurationError(f"the job's configuration is not valid: {_one_line(error)}") from error


async def memberships(directory: Path, stage: int) -> AsyncIterator[Membership]:
    """Yield the membership whenever its epoch has grown, for ever. Raises as ``newer_membership`` does."""
    seen = 0
    while True:
        membership = newer_membership(_read(directory / MEMBERSHIP_FILE), stage, seen)
        if membership:
            seen = membership.epoch
            yield membership
        await asyncio.sleep(POLL_SECONDS)


def newer_membership(text: str, stage: int, seen_epoch: int) -> Membership | None:
    """Return the membership that ``text`` holds, or None when it is empty or not newer than ``seen_epoch``.

    Raises ConfigurationError when it is not JSON of a supported version, or is of another stage.
    """
    if not text.strip():
        return None
    try:
        oldest = json.loads(text)["oldestReader"]
        if oldest > PROTOCOL_VERSION:
            raise ConfigurationError(
                f"membership: needs protocol {oldest} or newer; this worker image has {PROTOCOL_VERSION}; use one of "
                "the operator's release"
            )
        membership = Membership.model_validate_json(text)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"membership: not valid: {_one_line(error)}") from error
    if membership.epoch <= seen_epoch:
        return None
    if membership.stage != stage:
        raise ConfigurationError(
            f"membership: is of stage {membership.stage}; allowed: this pod's stage {stage}; delete the pod, "
            "the operator makes a new one"
        )
    return membership


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(LIMIT_BYTES)
    except FileNotFoundError:
        return ""


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
