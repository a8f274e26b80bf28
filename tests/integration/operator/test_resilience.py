"""Lost watches, lost leaders, lost nodes: the job goes on, and two operators never fight."""

import asyncio
import base64
import json
import signal
import urllib.request
from collections.abc import Callable

import pytest

from pipelinejob_operator.build.job import Job
from pipelinejob_operator.controller.execute import Executor
from pipelinejob_operator.runtime.cache import Cache, Key
from pipelinejob_operator.runtime.client import JOBS, LEASES, NODES, PODS, ApiError
from pipelinejob_worker.protocol import ExitCode
from tests.cluster.control_plane import ControlPlane
from tests.integration.operator.harness import (
    Api,
    Kubelet,
    Operator,
    conditions,
    eventually,
    job_manifest,
    running,
    state,
)

MEMBERSHIP = "pipelinejob.dev/membership"
DONE = 'pipelinejob_operator_reconciles_total{outcome="done"}'
GHOSTS = 'pipelinejob_operator_drift_total{kind="pod",what="ghost"}'


async def test_a_pod_that_vanished_while_the_watch_was_cut_is_found_as_soon_as_the_watch_is_back(
    api: Api, plane: ControlPlane, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    """The pod goes while the API server is down, so no watch will ever tell of its deletion."""
    with running(operator(PIPELINEJOB_RELIST_SECONDS="300")) as process:
        await api.create(JOBS, job_manifest(namespace))
        await eventually(lambda: api.job(namespace), state("Running"))
        await eventually(lambda: process.metric(DONE), lambda count: count > 0)
        assert await process.metric(GHOSTS) == 0
        plane.api_server.stop(signal.SIGKILL)
        delete_from_store(plane, f"/registry/pods/{namespace}/tiny-s1-a0")
        plane.api_server.start()
        job = await eventually(lambda: api.job(namespace), lambda job: job["status"]["restarts"] == 1)
        assert await process.metric(GHOSTS) == 1
        assert job["status"]["firstFailure"]["reason"] == "PodLost"
        assert job["status"]["firstFailure"]["stage"] == 1
        job = await eventually(lambda: api.job(namespace), state("Running"))
        assert job["status"]["attempt"] == 1


async def test_a_status_that_is_refused_as_stale_shows_what_the_watch_has_not_told(api: Api, namespace: str) -> None:
    """Nothing here watches, so the job's copy stays behind for ever unless the refusal itself mends it."""
    cache, key = Cache(), Key(namespace, "tiny")
    cache.put_job(await api.create(JOBS, job_manifest(namespace)))
    await api.set_spec(namespace, stages=4)
    executor = Executor(api, cache, None)

    async def write() -> None:
        manifest = cache.job(key)
        assert manifest
        job = Job.read(manifest)
        await executor.write_status(job, job.status.model_copy(update={"epoch": 7}))

    with pytest.raises(ApiError, match="422"):
        await write()
    await write()
    job = await api.job(namespace)
    assert (job["spec"]["stages"], job["status"]["epoch"]) == (4, 7)


def delete_from_store(plane: ControlPlane, key: str) -> None:
    """Delete an object from etcd itself."""
    body = json.dumps({"key": base64.b64encode(key.encode()).decode()}).encode()
    url = f"http://127.0.0.1:{plane.addresses.etcd_port}/v3/kv/deleterange"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, body), timeout=10) as response:
        assert json.load(response)["deleted"] == "1"


async def test_the_operator_killed_in_the_middle_changes_nothing_for_a_running_job(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    with running(operator()) as first:
        await api.create(JOBS, job_manifest(namespace))
        await eventually(lambda: api.job(namespace), state("Running"))
        before = [(pod["metadata"]["uid"], pod["spec"]) for pod in await api.pods(namespace)]
        first.stop(signal.SIGKILL)
    with running(operator("operator-2")) as second:
        await second.ready()
        await eventually(lambda: second.metric("pipelinejob_operator_leader"), lambda leads: leads == 1)
        await eventually(lambda: second.metric(DONE), lambda count: count > 0)
        assert [(pod["metadata"]["uid"], pod["spec"]) for pod in await api.pods(namespace)] == before
        assert (await api.job(namespace))["status"]["restarts"] == 0


async def test_the_standby_takes_over_at_once_when_the_leader_leaves_and_writes_nothing_before(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    with running(operator("operator-1")) as first:
        await eventually(lambda: holder(api, namespace), lambda name: name.startswith("operator-1"))
        with running(operator("operator-2")) as second:
            await second.ready()
            await api.create(JOBS, job_manifest(namespace, "one"))
            await eventually(lambda: api.job(namespace, "one"), state("Running"))
            assert await second.metric("pipelinejob_operator_leader") == 0
            assert await second.metric("pipelinejob_operator_writes_total") == 0
            assert first.stop() == 0
            await eventually(lambda: holder(api, namespace), lambda name: name.startswith("operator-2"))
            await api.create(JOBS, job_manifest(namespace, "two"))
            await eventually(lambda: api.job(namespace, "two"), state("Running"))


async def test_a_leader_whose_lease_was_taken_stops_and_exits(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    with running(operator("operator-1")) as first:
        await eventually(lambda: holder(api, namespace), lambda name: name.startswith("operator-1"))
        path = "/spec/holderIdentity"
        await api.json_patch(
            LEASES, namespace, "pipelinejob-operator", [{"op": "replace", "path": path, "value": "somebody-else"}]
        )
        assert first.process is not None
        assert await asyncio.to_thread(first.process.wait, 60) == 1
        assert await holder(api, namespace) == "somebody-else"


async def holder(api: Api, namespace: str) -> str:
    lease = await api.get(LEASES, namespace, "pipelinejob-operator")
    name: str = lease["spec"]["holderIdentity"] if lease else ""
    return name


async def test_a_membership_that_another_has_written_is_not_overwritten(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    """The fence against a paused former leader: each patch tests the value that it replaces."""
    kubelet.starts = False
    with running(operator()) as process:
        await api.create(JOBS, job_manifest(namespace))
        pods = await eventually(lambda: api.pods(namespace), lambda pods: len(pods) == 3)
        assert process.process is not None
        await eventually(lambda: api.pods(namespace), lambda pods: all(pod["spec"].get("nodeName") for pod in pods))
        path = f"/metadata/annotations/{MEMBERSHIP.replace('/', '~1')}"
        newer = '{"epoch":9}'
        await api.json_patch(PODS, namespace, "tiny-s1-a0", [{"op": "replace", "path": path, "value": newer}])
        stale = [{"op": "test", "path": path, "value": ""}, {"op": "replace", "path": path, "value": "old"}]
        try:
            await api.json_patch(PODS, namespace, "tiny-s1-a0", stale)
        except ApiError as error:
            assert error.code == 422
        else:
            raise AssertionError("the test operation must refuse")
        kubelet.starts = True
        await eventually(lambda: api.job(namespace), state("Running"))
        pods = await eventually(
            lambda: api.pods(namespace),
            lambda pods: all(pod["metadata"]["annotations"][MEMBERSHIP] for pod in pods),
        )
        assert pods[1]["metadata"]["annotations"][MEMBERSHIP] == newer


async def test_a_drained_stage_moves_the_gang_on_without_counting_a_failure(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    with running(operator()):
        await api.create(JOBS, job_manifest(namespace))
        await eventually(lambda: api.job(namespace), state("Running"))
        for pod in await api.pods(namespace):
            await kubelet.end(pod, ExitCode.DRAINED)
        job = await eventually(lambda: api.job(namespace), lambda job: job["status"]["attempt"] == 1)
        assert job["status"]["restarts"] == 0
        job = await eventually(lambda: api.job(namespace), state("Running"))
        assert conditions(job)["Succeeded"] == ("Unknown", "Active")


async def test_stages_that_only_lost_a_peer_wait_for_the_culprit_and_then_blame_the_silent_one(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    with running(operator()):
        await api.create(JOBS, job_manifest(namespace))
        await eventually(lambda: api.job(namespace), state("Running"))
        pods = await api.pods(namespace)
        await kubelet.end(pods[0], ExitCode.PEER_LOST)
        await kubelet.end(pods[1], ExitCode.PEER_LOST)
        job = await eventually(
            lambda: api.job(namespace), lambda job: conditions(job)["Running"] == ("False", "FailureSeen")
        )
        assert job["status"]["restarts"] == 0
        job = await eventually(lambda: api.job(namespace), lambda job: job["status"]["restarts"] == 1)
        assert job["status"]["firstFailure"]["stage"] == 2
        assert job["status"]["firstFailure"]["reason"] == "PeerLost"


async def test_an_operator_of_all_namespaces_does_not_wait_for_a_dead_node(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    kubelet.buries = False
    await api.post("/api/v1/nodes", {"metadata": {"name": "node-1"}})
    dead = [{"type": "Ready", "status": "Unknown", "reason": "NodeStatusUnknown"}]
    operations = [{"op": "add", "path": "/status/conditions", "value": dead}]
    await api.json_patch(NODES, "", "node-1", operations, "status")
    with running(operator(everywhere=True)):
        await api.create(JOBS, job_manifest(namespace, placement={"strategy": "Delegated"}))
        await eventually(lambda: api.job(namespace), state("Running"))
        pod = (await api.pods(namespace))[1]["metadata"]
        await api.delete(PODS, namespace, pod["name"], pod["uid"])
        job = await eventually(lambda: api.job(namespace), lambda job: job["status"]["restarts"] == 1, seconds=20)
        failure = job["status"]["firstFailure"]
        assert (failure["stage"], failure["reason"]) == (1, "PodLost")
        assert failure["message"] == "node node-1 does not answer"
