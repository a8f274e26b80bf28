"""A job whose agents recover by themselves, against a real API server: one stage at a time, the others untouched."""

import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from aiohttp import web

from pipelinejob_operator.build.names import SPARE_LABEL
from pipelinejob_operator.runtime.client import EVENTS, JOBS, PODS
from pipelinejob_worker.protocol import STATUS_PORT, AgentState, AgentStatus, ExitCode, FailureRecord, Membership
from tests.cluster.control_plane import ControlPlane
from tests.integration.operator.harness import (
    Api,
    Kubelet,
    Manifest,
    Operator,
    conditions,
    eventually,
    job_manifest,
    message,
    running,
    state,
)

MEMBERSHIP = "pipelinejob.dev/membership"


def ladder(namespace: str, stages: int = 4, **spec: object) -> Manifest:
    recovery = {"strategy": "Ladder", **spec.pop("recovery", {})}  # type: ignore[dict-item]
    return job_manifest(namespace, stages=stages, recovery=recovery, **spec)


async def started(api: Api, namespace: str, **spec: object) -> dict[str, str]:
    """A job whose group trains; the UIDs of its pods by name."""
    await api.create(JOBS, ladder(namespace, **spec))
    await eventually(lambda: api.job(namespace), state("Running"))
    await epoch_reaches(api, namespace, 1)
    return await uids(api, namespace)


async def uids(api: Api, namespace: str) -> dict[str, str]:
    return {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in await api.pods(namespace)}


def told(pod: Manifest) -> Membership | None:
    text = pod["metadata"]["annotations"][MEMBERSHIP]
    return Membership.model_validate_json(text) if text else None


async def epoch_reaches(api: Api, namespace: str, epoch: int, pods: int = 4) -> dict[str, Membership]:
    """Memberships by pod, once so many stage pods show this epoch, and no other does."""

    def all_show(seen: list[Manifest]) -> bool:
        shown = [told(pod) for pod in seen if SPARE_LABEL not in pod["metadata"]["labels"]]
        return len(shown) == pods and all(item is not None and item.epoch == epoch for item in shown)

    seen = await eventually(lambda: api.pods(namespace), all_show)
    return {pod["metadata"]["name"]: item for pod in seen if (item := told(pod))}


@asynccontextmanager
async def agent(
    job: Manifest, address: str, epoch: int, agent_state: AgentState = "Running", **said: object
) -> AsyncIterator[None]:
    """Serve the status of an agent at an address."""
    status = AgentStatus(job_uid=job["metadata"]["uid"], stage=0, epoch=epoch, state=agent_state)
    status = status.model_copy(update=said)

    async def answer(_: web.Request) -> web.Response:
        return web.Response(text=status.to_json(), content_type="application/json")

    app = web.Application()
    app.router.add_get("/status", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, address, STATUS_PORT).start()
    try:
        yield
    finally:
        await runner.cleanup()


async def test_a_pod_that_is_deleted_at_once_is_replaced_alone(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    with running(operator()):
        before = await started(api, namespace)
        await api.force_delete(PODS, namespace, "tiny-s1-a0")
        members = await epoch_reaches(api, namespace, 2)
        assert sorted(members) == ["tiny-s0-a0", "tiny-s1-a0-r1", "tiny-s2-a0", "tiny-s3-a0"]
        assert members["tiny-s1-a0-r1"].rank == 1
        job = await eventually(lambda: api.job(namespace), state("Running"))
        after = await uids(api, namespace)
        assert {name: uid for name, uid in after.items() if name in before} == {
            name: uid for name, uid in before.items() if name != "tiny-s1-a0"
        }
        status = job["status"]
        assert (status["attempt"], status["restarts"], status["epoch"]) == (0, 1, 2)
        assert (status["firstFailure"]["stage"], status["firstFailure"]["reason"]) == (1, "PodLost")
        assert [stage["restarts"] for stage in status["stages"]] == [0, 1, 0, 0]
        events = await eventually(
            lambda: api.items(EVENTS, namespace),
            lambda events: "Recovering" in {event["reason"] for event in events},
        )
        (event,) = [event for event in events if event["reason"] == "Recovering"]
        assert event["message"].startswith("stage 1 (pod tiny-s1-a0) on node node-1 failed (PodLost)")


async def test_a_drained_pod_is_replaced_when_it_has_handed_over_and_it_counts_as_no_failure(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    with running(operator()):
        before = await started(api, namespace)
        kubelet.buries = False
        await api.delete(PODS, namespace, "tiny-s2-a0", before["tiny-s2-a0"])
        pods = await eventually(lambda: api.pods(namespace), lambda pods: len(pods) == 5)
        newcomer = next(pod for pod in pods if pod["metadata"]["name"] == "tiny-s2-a0-r1")
        assert told(newcomer) is None, "the pod before still has the rank"
        leaving = next(pod for pod in pods if pod["metadata"]["name"] == "tiny-s2-a0")
        await kubelet.end(leaving, ExitCode.DRAINED)
        kubelet.buries = True
        members = await epoch_reaches(api, namespace, 1)
        assert members["tiny-s2-a0-r1"].rank == 2
        job = await eventually(lambda: api.job(namespace), state("Running"))
        assert job["status"]["restarts"] == 0
        assert "firstFailure" not in job["status"]


async def test_a_spare_takes_over_a_lost_stage_and_another_one_is_made(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    with running(operator()):
        await started(api, namespace, recovery={"spares": 1})
        await eventually(lambda: api.job(namespace), lambda job: job["status"]["readySpares"] == 1)
        before = await uids(api, namespace)
        assert "tiny-spare-0-a0" in before
        await api.force_delete(PODS, namespace, "tiny-s3-a0")
        pods = await eventually(
            lambda: api.pods(namespace),
            lambda pods: {"tiny-spare-0-a0", "tiny-spare-0-a1"} <= {pod["metadata"]["name"] for pod in pods},
        )
        promoted = next(pod for pod in pods if pod["metadata"]["name"] == "tiny-spare-0-a0")
        assert promoted["metadata"]["uid"] == before["tiny-spare-0-a0"]
        assert promoted["metadata"]["labels"]["pipelinejob.dev/stage"] == "3"
        assert SPARE_LABEL not in promoted["metadata"]["labels"]
        members = await epoch_reaches(api, namespace, 2)
        assert (members["tiny-spare-0-a0"].action, members["tiny-spare-0-a0"].rank) == ("Run", 3)
        job = await eventually(lambda: api.job(namespace), state("Running"))
        assert job["status"]["stages"][3]["pod"] == "tiny-spare-0-a0"
        assert len(await api.pods(namespace)) == 5


async def test_stages_come_and_go_and_the_others_stay(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    """4, 2, 3 and 4 stages: who leaves is asked until it has given all."""
    with running(operator()):
        before = await started(api, namespace)
        job = await api.job(namespace)
        await api.set_spec(namespace, stages=2)
        members = await epoch_reaches(api, namespace, 2)
        assert {name: (item.action, item.rank) for name, item in members.items()} == {
            "tiny-s0-a0": ("Run", 0),
            "tiny-s1-a0": ("Run", 1),
            "tiny-s2-a0": ("Leave", 2),
            "tiny-s3-a0": ("Leave", 3),
        }
        job = await eventually(lambda: api.job(namespace), state("Rescaling"))
        assert job["status"]["summary"]["stages"] == "2/2"
        async with agent(job, "127.0.0.13", 2, released=True):
            await eventually(lambda: uids(api, namespace), lambda pods: "tiny-s3-a0" not in pods)
            assert "tiny-s2-a0" in await uids(api, namespace), "it has not given all"
        async with agent(job, "127.0.0.12", 2, released=True):
            await eventually(lambda: uids(api, namespace), lambda pods: len(pods) == 2)
        job = await eventually(lambda: api.job(namespace), state("Running"))
        assert job["status"]["epoch"] == 2

        for stages, epoch in ((3, 3), (4, 4)):
            await api.set_spec(namespace, stages=stages)
            members = await epoch_reaches(api, namespace, epoch, pods=stages)
            assert {item.world_size for item in members.values()} == {stages}
        job = await eventually(lambda: api.job(namespace), state("Running"))
        assert job["status"]["summary"]["stages"] == "4/4"
        assert (job["status"]["restarts"], job["status"]["attempt"]) == (0, 0)
        after = await uids(api, namespace)
        assert (after["tiny-s0-a0"], after["tiny-s1-a0"]) == (before["tiny-s0-a0"], before["tiny-s1-a0"])


async def test_what_the_model_cannot_do_is_refused_and_the_job_runs_on(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    train = job_manifest(namespace)["spec"]["train"] | {"schedule": {"name": "GPipe"}}
    with running(operator()):
        before = await started(api, namespace, train=train)
        await api.set_spec(namespace, stages=12)
        job = await eventually(
            lambda: api.job(namespace), lambda job: conditions(job)["Accepted"] == ("False", "TooFewLayers")
        )
        assert message(job, "Accepted").endswith("; the job runs on with 4 stages")
        assert job["status"]["summary"]["state"] == "Running"
        assert await uids(api, namespace) == before


async def test_what_agents_have_answered_is_counted_and_told_once(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    crash = FailureRecord(rank=2, at=1.5e9, exit_code=139, signal="SIGSEGV", reason="Signal", step=7, epoch=1)
    with running(operator()):
        before = await started(api, namespace)
        async with agent(await api.job(namespace), "127.0.0.10", 1, failures=(crash,)):
            job = await eventually(lambda: api.job(namespace), lambda job: job["status"]["restarts"] == 1)
            assert job["status"]["firstFailure"]["exitCode"] == 139
            assert job["status"]["stages"][2]["restarts"] == 1
        assert await uids(api, namespace) == before


async def test_an_operator_that_dies_in_a_recovery_has_a_successor_that_ends_it(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    with running(operator()) as first:
        before = await started(api, namespace)
        kubelet.binds = False
        await api.force_delete(PODS, namespace, "tiny-s0-a0")
        await eventually(lambda: uids(api, namespace), lambda pods: "tiny-s0-a0-r1" in pods)
        first.stop(signal.SIGKILL)
    kubelet.binds = True
    with running(operator("operator-2")):
        members = await epoch_reaches(api, namespace, 3)
        assert {item.master_address for item in members.values()} == {"127.0.0.30"}
        job = await eventually(lambda: api.job(namespace), state("Running"))
        assert (job["status"]["restarts"], job["status"]["attempt"]) == (1, 0)
        after = await uids(api, namespace)
        assert {name: after.get(name) for name in before if name != "tiny-s0-a0"} == {
            name: uid for name, uid in before.items() if name != "tiny-s0-a0"
        }


async def test_suspend_lets_the_stages_stop_together_and_a_resume_begins_a_new_attempt(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    with running(operator()):
        await started(api, namespace, recovery={"spares": 1})
        await api.set_spec(namespace, suspend=True)
        members = await epoch_reaches(api, namespace, 2)
        assert {item.action for item in members.values()} == {"Stop"}
        for pod in await api.pods(namespace):
            if SPARE_LABEL not in pod["metadata"]["labels"]:
                await kubelet.end(pod, ExitCode.DRAINED)
        await eventually(lambda: api.job(namespace), state("Suspended"))
        assert await api.pods(namespace) == []
        await api.set_spec(namespace, suspend=False)
        job = await eventually(lambda: api.job(namespace), state("Running"))
        assert (job["status"]["restarts"], job["status"]["attempt"]) == (0, 1)
        members = await epoch_reaches(api, namespace, 3)
        assert {item.action for item in members.values()} == {"Run"}


async def test_an_api_server_that_knows_no_restart_in_place_gets_pods_without(
    api: Api, plane: ControlPlane, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    before = plane.configuration.feature_gates
    plane.reconfigure(feature_gates={**before, "RestartAllContainersOnContainerExits": False})
    try:
        with running(operator()):
            await started(api, namespace)
            containers = [pod["spec"]["containers"][0] for pod in await api.pods(namespace)]
            assert ["restartPolicyRules" in container for container in containers] == [False] * 4
    finally:
        plane.reconfigure(feature_gates=before)
