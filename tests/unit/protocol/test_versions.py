"""Operator and worker of neighbouring releases understand each other: what each version wrote is kept here."""

import json
from typing import Any

import pytest

from pipelinejob_worker.protocol import (
    MEMBERSHIP_LIMIT_BYTES,
    OLDEST_READER,
    PROTOCOL_VERSION,
    AgentStatus,
    Membership,
    Termination,
)
from pipelinejob_worker.protocol.base import Wire

MEMBERSHIP = {
    "protocolVersion": 1,
    "oldestReader": 1,
    "epoch": 3,
    "action": "Run",
    "stage": 1,
    "stages": 4,
    "masterAddress": "10.0.0.1",
    "masterPort": 29500,
    "previousAddress": "10.0.0.1",
    "nextAddress": "10.0.0.3",
}
PROGRESS = {
    "step": 7,
    "totalSteps": 20,
    "loss": 2.5,
    "tokensPerSecond": 900.5,
    "bubblePercent": 30.0,
    "bubbleLimitPercent": 27.3,
    "remainingSeconds": 4.0,
    "lastCheckpointStep": 5,
    "stages": [{"stage": 0, "busyPercent": 70, "layers": "0-2"}],
}
STATUS = {
    "protocolVersion": 1,
    "oldestReader": 1,
    "jobUid": "u",
    "stage": 1,
    "epoch": 3,
    "state": "Running",
    "layers": "3-4",
    "progress": PROGRESS,
}
TERMINATION = {"stage": 1, "exitCode": 1, "reason": "Error", "message": "m", "step": 7, "logTail": ["a", "b"]}

WRITTEN: dict[int, list[tuple[type[Wire], dict[str, Any]]]] = {
    1: [(Membership, MEMBERSHIP), (AgentStatus, STATUS), (Termination, TERMINATION)],
    2: [
        (Membership, MEMBERSHIP | {"protocolVersion": 2}),
        (AgentStatus, STATUS | {"protocolVersion": 2}),
        (Termination, TERMINATION | {"progress": PROGRESS}),
    ],
}


@pytest.mark.parametrize("version", range(OLDEST_READER, PROTOCOL_VERSION + 1))
def test_what_a_supported_version_wrote_is_read_whole(version: int) -> None:
    assert version in WRITTEN, f"keep an example of what version {version} writes"
    for model, document in WRITTEN[version]:
        read = model.model_validate(document)
        assert json.loads(read.to_json()) | document == json.loads(read.to_json()), "a member was lost or changed"


def test_what_this_version_writes_says_who_can_read_it() -> None:
    written = Membership(epoch=1, action="Run", stage=0, stages=1, master_address="a", master_port=1)
    assert (written.protocol_version, written.oldest_reader) == (PROTOCOL_VERSION, OLDEST_READER)


def test_a_reader_ignores_what_a_later_version_adds() -> None:
    for model, document in WRITTEN[PROTOCOL_VERSION]:
        assert model.model_validate({**document, "addedLater": 1}) == model.model_validate(document)


def test_a_membership_stays_small_however_many_stages_there_are() -> None:
    address = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"
    largest = Membership(
        epoch=2**31,
        action="Run",
        stage=511,
        stages=512,
        master_address=address,
        master_port=65535,
        previous_address=address,
        next_address=address,
    )
    assert len(largest.to_json()) < MEMBERSHIP_LIMIT_BYTES
