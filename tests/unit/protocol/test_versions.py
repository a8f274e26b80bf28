"""Operator and worker of neighbouring releases understand each other: what each version wrote is kept here."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest

from pipelinejob_worker.protocol import (
    MEMBERSHIP_LIMIT_BYTES,
    OLDEST_READER,
    PROTOCOL_VERSION,
    AgentStatus,
    Membership,
    Mode,
    Recovery,
    Termination,
    WorkerConfig,
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
CONFIG = {
    "protocolVersion": 2,
    "oldestReader": 1,
    "job": "tiny",
    "jobUid": "u",
    "model": {"preset": {"name": "gpt", "layers": 4, "width": 32, "heads": 2, "context": 32, "dropout": "0.1"}},
    "train": {
        "data": {"files": ["/data/*.txt"], "format": "Text", "tokenizer": "Bytes"},
        "steps": 20,
        "globalBatchSize": 16,
        "microbatches": 4,
        "schedule": {"name": "GPipe"},
        "optimizer": {"name": "AdamW", "learningRate": "1e-2", "weightDecay": "0.1", "clipNorm": "1.0"},
        "seed": 7,
    },
    "checkpoint": {"volumeClaimName": "saves", "everySteps": 50, "keep": 2},
}

PROGRESS_3 = PROGRESS | {
    "bubblePredictedPercent": 29.1,
    "stepSeconds": 1.25,
    "stepPredictedSeconds": 1.2,
    "modelFlopsPercent": 41.5,
    "modelTeraFlops": 12.5,
    "validationLoss": 2.75,
    "validationStep": 5,
    "skippedSteps": 1,
    "checkpointProblem": "the checkpoint of step 6 was not written: no space is left",
    "checkpointDamaged": False,
    "stages": [
        {
            "stage": 0,
            "busyPercent": 70,
            "layers": "0-2,9-11",
            "forwardPercent": 25,
            "backwardPercent": 35,
            "weightPercent": 10,
            "updatePercent": 5,
            "waitingPercent": 20,
            "sendingPercent": 3,
        }
    ],
}
VERSION_3 = {"protocolVersion": 3, "oldestReader": 2}
CONFIG_3 = CONFIG | {
    "protocolVersion": 3,
    "oldestReader": 3,
    "model": {"huggingFace": {"path": "Qwen/Qwen3-0.6B", "revision": "main", "context": 32}},
    "train": {
        "data": {
            "files": ["/data/*.jsonl"],
            "format": "JsonLines",
            "textField": "content",
            "tokenizer": "HuggingFace",
            "tokenizerPath": "/models/tokenizer",
            "packing": "Documents",
            "validationPercent": 5,
        },
        "steps": 20,
        "globalBatchSize": 16,
        "microbatches": 4,
        "schedule": {"name": "ZBVZeroBubble", "chunksPerStage": 2},
        "optimizer": {
            "name": "SGD",
            "learningRate": "1e-2",
            "warmupSteps": 5,
            "decay": "Cosine",
            "finalLearningRate": "1e-4",
            "weightDecay": "0.1",
            "clipNorm": "1.0",
            "momentum": "0.8",
            "beta1": "0.9",
            "beta2": "0.99",
        },
        "precision": "BFloat16",
        "activationCheckpointing": True,
        "compile": False,
        "validateEverySteps": 10,
        "seed": 7,
    },
    "partition": {"strategy": "Manual", "boundaries": [2, 4, 6], "memoryLimitMiB": 1024},
}

VERSION_4 = {"protocolVersion": 4, "oldestReader": 4}
MEMBERSHIP_4 = MEMBERSHIP | VERSION_4 | {"action": "Leave", "pipeline": 1, "pipelines": 2, "leavers": 2, "leaver": 1}
FAILURE = {
    "rank": 2,
    "at": 1764281000.5,
    "exitCode": 139,
    "signal": "SIGSEGV",
    "reason": "Signal",
    "message": "the worker process was killed by SIGSEGV",
    "step": 6,
    "node": "node-3",
    "epoch": 3,
    "attempt": 1,
    "logTail": ["a", "b"],
}
STATUS_4 = (
    STATUS
    | VERSION_4
    | {
        "state": "Recovering",
        "progress": PROGRESS_3,
        "incarnationAttempt": 2,
        "workerRestarts": 1,
        "failures": [FAILURE],
        "protection": {
            "step": 7,
            "guardedStep": 6,
            "intervalSteps": 1,
            "atRiskSteps": 1,
            "costPercent": 1.5,
            "problem": "rank 2 does not keep the copy of step 7",
        },
        "traffic": {"piecesSentBytes": 100, "piecesReceivedBytes": 200, "piecesFetchedBytes": 50},
        "recovery": {"lastPauseSeconds": 0.5, "resumedStep": 6, "stepsRepeated": 1},
        "released": True,
        "refused": "epoch 3 is not 4",
    }
)
CONFIG_4 = CONFIG_3 | {
    "protocolVersion": 4,
    "oldestReader": 4,
    "recovery": {
        "strategy": "Ladder",
        "snapshotEverySteps": 1,
        "hangTimeoutSeconds": 60,
        "maxRestarts": 5,
        "windowSeconds": 600,
        "memoryBytes": 1 << 30,
    },
}
ENGINE = {"maxTokensInFlight": 4096, "keyValueCacheMiB": 64, "batchTokens": 256, "deterministic": True}
SERVED = {name: CONFIG_3[name] for name in ("job", "jobUid", "model", "partition", "checkpoint")} | {
    **VERSION_4,
    "recovery": CONFIG_4["recovery"],
    "source": {"job": "trained", "seed": 7, "step": 50},
    "tokenizer": {"name": "HuggingFace", "path": "/models/tokenizer"},
}
SERVE_4 = SERVED | {"mode": "Serve", "serve": ENGINE}
BATCH_4 = SERVED | {"mode": "Batch", "batch": ENGINE | {"input": "/data/in.jsonl", "output": "/data/out.jsonl"}}
SERVING = {
    "requestsPerSecond": 1.5,
    "promptTokensPerSecond": 300.5,
    "queued": 2,
    "running": 8,
    "cachePercent": 40.5,
    "preemptions": 1,
}

WRITTEN: dict[int, list[tuple[type[Wire], dict[str, Any]]]] = {
    1: [(Membership, MEMBERSHIP), (AgentStatus, STATUS), (Termination, TERMINATION)],
    2: [
        (Membership, MEMBERSHIP | {"protocolVersion": 2}),
        (AgentStatus, STATUS | {"protocolVersion": 2}),
        (Termination, TERMINATION | {"progress": PROGRESS}),
        (WorkerConfig, CONFIG),
    ],
    3: [
        (Membership, MEMBERSHIP | VERSION_3 | {"oldestReader": 3, "pipeline": 1, "pipelines": 2}),
        (AgentStatus, STATUS | VERSION_3 | {"progress": PROGRESS_3}),
        (Termination, TERMINATION | {"progress": PROGRESS_3}),
        (WorkerConfig, CONFIG_3),
    ],
    4: [
        (Membership, MEMBERSHIP_4),
        (AgentStatus, STATUS_4),
        (Termination, TERMINATION | {"progress": PROGRESS_3 | {"serving": SERVING}}),
        (WorkerConfig, CONFIG_4 | {"mode": "Train"}),
        (WorkerConfig, SERVE_4),
        (WorkerConfig, BATCH_4),
    ],
}


def holds(whole: Any, part: Any) -> bool:
    """Whether all that is in ``part`` is in ``whole``, with the same values."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(name in whole and holds(whole[name], part[name]) for name in part)
    if isinstance(part, list):
        return isinstance(whole, list) and len(whole) == len(part) and all(map(holds, whole, part))
    return bool(whole == part)


@pytest.mark.parametrize("version", range(OLDEST_READER, PROTOCOL_VERSION + 1))
def test_what_a_supported_version_wrote_is_read_whole(version: int) -> None:
    assert version in WRITTEN, f"keep an example of what version {version} writes"
    for model, document in WRITTEN[version]:
        read = model.model_validate(document)
        assert holds(json.loads(read.to_json()), document), f"{model.__name__}: a member was lost or changed"


def test_the_examples_of_this_version_have_every_member() -> None:
    for model in {model for model, _ in WRITTEN[PROTOCOL_VERSION]}:
        documents = [document for kind, document in WRITTEN[PROTOCOL_VERSION] if kind is model]
        assert {field.alias for field in model.model_fields.values()} == set().union(*documents), model.__name__
        for document in documents:
            assert list(missing(model.model_validate(document).model_dump(by_alias=True), document)) == []


def missing(whole: Any, part: Any, path: str = "") -> Iterator[str]:
    """Paths of members that are in ``whole`` but not in ``part``; other sources of a model cannot be there at once."""
    if isinstance(whole, dict):
        for name, value in whole.items():
            if name in part:
                yield from missing(value, part[name], f"{path}.{name}")
            elif value is not None:
                yield f"{path}.{name}"
    elif isinstance(whole, list | tuple):
        for index, value in enumerate(whole):
            yield from missing(value, part[index], f"{path}[{index}]")


def test_a_reader_of_the_version_before_finds_all_that_it_knows() -> None:
    before = dict(WRITTEN[PROTOCOL_VERSION - 1])
    for model, document in WRITTEN[PROTOCOL_VERSION]:
        if model is not WorkerConfig:  # whether that can be read is the next test's subject
            assert set(before[model]) <= set(document), model.__name__


def test_what_this_version_writes_says_who_can_read_it() -> None:
    written = Membership(epoch=1, action="Run", stage=0, stages=1, master_address="a", master_port=1)
    assert (written.protocol_version, written.oldest_reader) == (PROTOCOL_VERSION, OLDEST_READER)


def config(**changes: Any) -> WorkerConfig:
    """The configuration of a job that uses only what version 1 had, with some members changed by their paths."""
    document = copy.deepcopy(CONFIG)
    for path, value in changes.items():
        *parents, last = path.split("__")
        node: dict[str, Any] = document
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    read = WorkerConfig.model_validate(document)
    return WorkerConfig.of(
        job=read.job,
        job_uid=read.job_uid,
        model=read.model,
        train=read.train,
        partition=read.partition,
        checkpoint=read.checkpoint,
        recovery=read.recovery,
    )


def test_a_job_of_old_features_can_be_read_by_workers_of_version_1() -> None:
    written = config()
    assert (written.protocol_version, written.oldest_reader) == (PROTOCOL_VERSION, 1)
    expected = {**CONFIG, "protocolVersion": PROTOCOL_VERSION}
    assert holds(json.loads(written.to_json()), expected)


@pytest.mark.parametrize("schedule", ["GPipe", "1F1B"])
def test_the_schedules_of_version_1_need_no_newer_reader(schedule: str) -> None:
    assert config(train__schedule={"name": schedule}).oldest_reader == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"huggingFace": {"path": "/models/llama", "context": 32}}},
        {"model": {"module": {"function": "mine:build"}}},
        {"model__preset__tieEmbeddings": True},
        {"train__data__format": "JsonLines"},
        {"train__data__tokenizer": "HuggingFace"},
        {"train__data__packing": "Documents"},
        {"train__data__validationPercent": 1},
        {"train__schedule": {"name": "LoopedBFS"}},
        {"train__schedule": {"name": "Interleaved1F1B", "chunksPerStage": 2}},
        {"train__optimizer__name": "SGD"},
        {"train__optimizer__warmupSteps": 1},
        {"train__optimizer__decay": "Cosine"},
        {"train__optimizer__beta2": "0.95"},
        {"train__precision": "BFloat16"},
        {"train__activationCheckpointing": True},
        {"train__compile": True},
        {"partition": {"strategy": "Even"}},
        {"partition": {"memoryLimitMiB": 1}},
    ],
    ids=str,
)
def test_whatever_is_newer_needs_a_reader_that_knows_it(changes: dict[str, Any]) -> None:
    assert config(**changes).oldest_reader == 3


def test_who_recovers_among_agents_needs_a_reader_of_version_4() -> None:
    assert config(recovery={"strategy": "Ladder"}).oldest_reader == 4
    assert config(recovery={"strategy": "RecreateAll", "maxRestarts": 5}).oldest_reader == 1
    assert WorkerConfig.model_validate(CONFIG_3).recovery.strategy == "RecreateAll", "as an older operator restarts"


@pytest.mark.parametrize("mode", ["Serve", "Batch"])
def test_who_serves_needs_a_reader_of_version_4(mode: Mode) -> None:
    read = WorkerConfig.model_validate(SERVE_4 if mode == "Serve" else BATCH_4)
    written = WorkerConfig.of(
        job=read.job,
        job_uid=read.job_uid,
        model=read.model,
        mode=mode,
        serve=read.serve,
        batch=read.batch,
        partition=read.partition,
        checkpoint=read.checkpoint,
        recovery=Recovery(strategy="RecreateAll"),
    )
    assert written.oldest_reader == 4
    assert written.engine.batch_tokens == 256
    with pytest.raises(ValueError, match=f"spec.mode: {mode} does not train; allowed: Train"):
        _ = written.training


def test_who_leaves_has_a_rank_behind_those_who_train() -> None:
    assert Membership.model_validate(MEMBERSHIP).rank == 1
    assert Membership.model_validate(MEMBERSHIP_4).rank == 2 * 4 + 1


def test_a_reader_ignores_what_a_later_version_adds() -> None:
    for model, document in WRITTEN[PROTOCOL_VERSION]:
        assert model.model_validate({**document, "addedLater": 1}) == model.model_validate(document)


def test_a_membership_stays_small_however_many_stages_there_are() -> None:
    address = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"
    largest = Membership(
        epoch=2**31,
        action="Run",
        stage=255,
        stages=256,
        pipeline=1,
        pipelines=2,
        master_address=address,
        master_port=65535,
        previous_address=address,
        next_address=address,
        leavers=255,
        leaver=254,
    )
    assert len(largest.to_json()) < MEMBERSHIP_LIMIT_BYTES
