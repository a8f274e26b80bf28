"""What the placer does in time: it plans beside the event loop, gives up late plans, and lets nodes rest."""

import asyncio
import time
from datetime import datetime
from typing import Any

import pytest

from pipelinejob_operator.build.job import Job
from pipelinejob_operator.controller import placer as module
from pipelinejob_operator.controller.observed import Unplaced
from pipelinejob_operator.controller.placer import Placer
from pipelinejob_operator.controller.placing import Decision
from pipelinejob_operator.policy.reasons import Reason
from pipelinejob_operator.runtime.cache import Cache, Key
from pipelinejob_operator.runtime.client import NOT_FOUND, ApiError, Kubernetes
from pipelinejob_operator.runtime.inventory import Inventory
from tests.unit.operator.builders import INSTALLATION, NOW, UID, manifest, seconds


class Server(Kubernetes):
    """An API server that takes every patch and serves no device classes."""

    def __init__(self, inventory: Inventory) -> None:
        self.pods: dict[str, dict[str, Any]] = {}
        self.patched: list[str] = []
        self.refuses = ""

    async def pages(self, resource: Any, namespace: str, labels: str = "") -> Any:
        raise ApiError(NOT_FOUND, "NotFound", "no such API")
        yield

    async def json_patch(
        self, resource: Any, namespace: str, name: str, operations: list[dict[str, Any]], subresource: str = ""
    ) -> dict[str, Any]:
        if name == self.refuses:
            raise ApiError(403, "Forbidden", "a webhook said no")
        self.patched.append(name)
        pod = self.pods[name]
        pinned = next(item["value"] for item in operations if item["path"] == "/spec/affinity")
        meta = pod["metadata"] | {"resourceVersion": "50"}
        spec = {key: value for key, value in pod["spec"].items() if key != "schedulingGates"} | {"affinity": pinned}
        return pod | {"metadata": meta, "spec": spec}


class Bed:
    """Two stages behind their gates, and nodes with a GPU each."""

    def __init__(self, nodes: int = 2) -> None:
        self.now = NOW
        self.cache, self.inventory = Cache(), Inventory()
        self.server = Server(self.inventory)
        self.woken: list[Key] = []
        self.placer = Placer(
            self.server,
            self.cache,
            self.inventory,
            installation=INSTALLATION,
            wake=self.woken.append,
            clock=lambda: self.now,
        )
        self.inventory.more_room = self.placer.more_room
        self.manifest = manifest(meta={"creationTimestamp": "2026-01-01T11:00:00Z"}, stages=2)
        self.cache.put_job(self.manifest)
        self.job = Job.read(self.manifest)
        for stage in range(2):
            self.add_pod(stage)
        for number in range(nodes):
            self.add_node(f"n{number}")

    def add_pod(self, stage: int) -> None:
        labels = {"pipelinejob.dev/stage": str(stage), "pipelinejob.dev/stages": "2", "pipelinejob.dev/attempt": "0"}
        ours = {
            "app.kubernetes.io/managed-by": "pipelinejob-operator",
            "pipelinejob.dev/job": "tiny",
            "pipelinejob.dev/job-uid": UID,
        }
        name = f"tiny-s{stage}-a0"
        container = {"name": "worker", "resources": {"requests": {"nvidia.com/gpu": "1"}}}
        pod = {
            "metadata": {
                "name": name,
                "namespace": "team",
                "uid": name,
                "resourceVersion": "10",
                "labels": labels | ours,
                "ownerReferences": [{"uid": UID}],
            },
            "spec": {"containers": [container], "schedulingGates": [{"name": "pipelinejob.dev/gang"}]},
        }
        self.server.pods[name] = pod
        self.cache.put_pod(pod)
        self.inventory.put_pod(pod)

    def add_node(self, name: str) -> None:
        status = {"allocatable": {"nvidia.com/gpu": "1", "pods": "10"}}
        self.inventory.put_node({"metadata": {"name": name, "uid": name, "resourceVersion": "1"}, "status": status})

    async def place(self) -> Any:
        return await self.placer.place(self.job)


async def test_all_gates_open_in_one_turn_and_the_room_is_taken_at_once() -> None:
    bed = Bed()
    assert await bed.place() is None
    assert bed.server.patched == ["tiny-s0-a0", "tiny-s1-a0"]
    assert [node.free["nvidia.com/gpu"] for node in bed.inventory.nodes()] == [0, 0]
    assert bed.inventory.gated() == {}


async def test_no_gate_opens_where_not_all_fit() -> None:
    bed = Bed(nodes=1)
    answer = await bed.place()
    assert isinstance(answer, Unplaced)
    assert (answer.reason, answer.retry_at) == (Reason.NO_PLAN, NOW + seconds(30))
    assert bed.server.patched == []


async def test_a_refused_patch_is_told_with_the_servers_words() -> None:
    bed = Bed()
    bed.server.refuses = "tiny-s1-a0"
    answer = await bed.place()
    assert (answer.what, answer.reason) == ("opening pod tiny-s1-a0", Reason.POD_REFUSED)
    assert "a webhook said no" in answer.words


async def test_a_plan_that_takes_too_long_is_given_up_and_does_not_hold_up_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bed = Bed()
    may_end = asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(*_: Any) -> Decision:
        asyncio.run_coroutine_threadsafe(may_end.wait(), loop).result()
        raise AssertionError("nobody waits for this any more")

    monkeypatch.setattr(module, "PLAN_SECONDS", 0.2)
    monkeypatch.setattr(module, "decide", slow)
    started = time.monotonic()
    first, ticks = asyncio.create_task(bed.place()), 0
    while not first.done():
        ticks += 1
        await asyncio.sleep(0.01)
    assert ticks > 5, "the loop went on"
    assert first.result().message.startswith("no plan was found within")
    second = await bed.place()
    assert second.message == first.result().message, "one late plan at a time, and nobody waits for it"
    assert time.monotonic() - started < 5
    may_end.set()
    with pytest.raises(AssertionError):
        await bed.placer._thread  # type: ignore[misc]


class TestAvoidance:
    async def allowed(self, bed: Bed, at: datetime) -> bool:
        """Whether the first of two nodes may be used; the gang needs both."""
        bed.now = at
        return await bed.place() is None

    async def test_a_node_rests_for_a_while_and_the_job_is_looked_at_when_that_is_over(self) -> None:
        bed = Bed()
        bed.placer.note_release(bed.job, "n0")
        bed.now = NOW + seconds(10)
        answer = await bed.place()
        assert "1 left out for a while because a stage found no place there" in answer.message
        assert answer.retry_at == NOW + seconds(30)
        assert await self.allowed(bed, NOW + seconds(30))

    async def test_it_rests_twice_as_long_if_that_happens_again(self) -> None:
        bed = Bed()
        bed.placer.note_release(bed.job, "n0")
        bed.placer.note_release(bed.job, "n0")  # another stage of the same gang: one reason
        bed.now = NOW + seconds(31)
        bed.placer.note_release(bed.job, "n0")
        assert not await self.allowed(bed, NOW + seconds(90))
        assert await self.allowed(bed, NOW + seconds(91))

    async def test_what_lies_long_back_is_forgotten(self) -> None:
        bed = Bed()
        bed.placer.note_release(bed.job, "n0")
        bed.now = NOW + seconds(3600)
        bed.placer.note_release(bed.job, "n0")
        assert not await self.allowed(bed, NOW + seconds(3629))
        assert await self.allowed(bed, NOW + seconds(3630))


async def test_room_wakes_who_waits_once_for_all_that_comes_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SETTLE_SECONDS", 0.0)
    bed = Bed(nodes=0)
    for number in range(5):
        bed.add_node(f"n{number}")
    await asyncio.sleep(0.01)
    assert bed.woken == [Key("team", "tiny")]
