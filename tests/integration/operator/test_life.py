"""A job's whole life against a real API server: from creation over failures to its end."""

from collections.abc import Callable
from functools import partial

from aiohttp import web

from pipelinejob_operator.runtime.client import CLAIMS, EVENTS, JOBS
from pipelinejob_worker.protocol import (
    STATUS_PORT,
    AgentStatus,
    ExitCode,
    Membership,
    Progress,
    StageTiming,
    Termination,
)
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


async def test_a_job_runs_shows_its_progress_and_succeeds(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    with running(operator()):
        created = await api.create(JOBS, job_manifest(namespace))
        job = await eventually(lambda: api.job(namespace), state("Running"))
        assert conditions(job) == {
            "Accepted": ("True", "Valid"),
            "Placed": ("True", "AllStagesPlaced"),
            "Running": ("True", "AllStagesReady"),
            "Suspended": ("False", "NotSuspended"),
            "Succeeded": ("Unknown", "Active"),
        }
        assert job["status"]["summary"]["stages"] == "3/3"

        pods = await eventually(
            lambda: api.pods(namespace),
            lambda pods: all(pod["metadata"]["annotations"][MEMBERSHIP] for pod in pods),
        )
        assert [pod["metadata"]["name"] for pod in pods] == ["tiny-s0-a0", "tiny-s1-a0", "tiny-s2-a0"]
        middle = Membership.model_validate_json(pods[1]["metadata"]["annotations"][MEMBERSHIP])
        assert middle == Membership(
            epoch=1,
            action="Run",
            stage=1,
            stages=3,
            master_address="127.0.0.10",
            master_port=29500,
            previous_address="127.0.0.10",
            next_address="127.0.0.12",
        )

        agent = await _agent(created["metadata"]["uid"])
        try:
            job = await eventually(
                lambda: api.job(namespace), lambda job: job["status"]["summary"]["step"] == "120/200"
            )
        finally:
            await agent.cleanup()
        assert job["status"]["summary"] == {
            "state": "Running",
            "stages": "3/3",
            "step": "120/200",
            "progress": "60%",
            "loss": "2.31",
            "tokensPerSecond": "14.2k",
            "bubble": "29%",
            "bubbleLimit": "27%",
            "requestsPerSecond": "",
            "queue": "",
            "fronts": "",
            "modelFlops": "",
            "crossings": "",
        }
        assert [stage["layers"] for stage in job["status"]["stages"]] == ["0-2", "3-5", "6-9"]
        assert [stage["waitingPercent"] for stage in job["status"]["stages"]] == [25, 24, 26]
        progress = job["status"]["progress"]
        assert (progress["stepMilliseconds"], progress["validationLoss"]) == (500, "2.4")

        told = Termination(stage=0, exit_code=0, reason="Completed", step=200).to_json()
        for pod in await api.pods(namespace):
            await kubelet.end(pod, 0, told)
        job = await eventually(lambda: api.job(namespace), state("Succeeded"))
        assert conditions(job)["Succeeded"] == ("True", "AllStagesSucceeded")
        assert (job["status"]["summary"]["step"], job["status"]["summary"]["stages"]) == ("200/200", "3/3")
        assert job["status"]["completionTime"]
        assert len(await api.pods(namespace)) == 3, "the default policy keeps pods that have ended"

        await event_reasons(api, namespace, {"Valid", "AllStagesPlaced", "AllStagesReady", "AllStagesSucceeded"})


async def event_reasons(api: Api, namespace: str, wanted: set[str]) -> list[str]:
    """Reasons of all Events, once the wanted ones are among them: they follow the status that they tell of."""
    events = await eventually(
        lambda: api.items(EVENTS, namespace),
        lambda events: wanted <= {event["reason"] for event in events},
    )
    return [event["reason"] for event in events]


def all_of_attempt(attempt: int, pods: list[Manifest]) -> bool:
    return [pod["metadata"]["name"] for pod in pods] == [f"tiny-s{stage}-a{attempt}" for stage in range(3)]


async def _agent(job_uid: str, **progress: object) -> web.AppRunner:
    """Serve the status of stage 0, as its agent does."""
    status = AgentStatus(
        job_uid=job_uid,
        stage=0,
        epoch=1,
        state="Running",
        progress=Progress(
            step=120,
            total_steps=200,
            loss=2.3123,
            tokens_per_second=14211.0,
            bubble_percent=29.2,
            bubble_limit_percent=27.3,
            step_seconds=0.5,
            validation_loss=2.4,
            remaining_seconds=40.0,
            last_checkpoint_step=100,
            stages=[
                StageTiming(stage=0, busy_percent=71, layers="0-2", waiting_percent=25),
                StageTiming(stage=1, busy_percent=72, layers="3-5", waiting_percent=24),
                StageTiming(stage=2, busy_percent=70, layers="6-9", waiting_percent=26),
            ],
        ).model_copy(update=progress),
    )

    async def answer(_: web.Request) -> web.Response:
        return web.Response(text=status.to_json(), content_type="application/json")

    app = web.Application()
    app.router.add_get("/status", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.10", STATUS_PORT).start()
    return runner


async def test_a_failed_stage_restarts_the_gang_until_the_budget_is_spent(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    with running(operator()):
        await api.create(JOBS, job_manifest(namespace, recovery={"maxRestarts": 1, "windowSeconds": 3600}))
        for attempt in (0, 1):
            await eventually(lambda: api.job(namespace), state("Running"))
            pods = await eventually(
                lambda: api.pods(namespace),
                partial(all_of_attempt, attempt),
            )
            told = Termination(
                stage=1, exit_code=1, reason="WorkerFailed", message="loss is NaN", step=7, log_tail=["Traceback", "x"]
            )
            await kubelet.end(pods[0], ExitCode.PEER_LOST)
            await kubelet.end(pods[1], 1, told.to_json())
            await kubelet.end(pods[2], ExitCode.PEER_LOST)
            if attempt == 0:
                job = await eventually(lambda: api.job(namespace), lambda job: job["status"]["restarts"] == 1)
                assert job["status"]["attempt"] == 1
                assert job["status"]["firstFailure"] == {
                    "stage": 1,
                    "pipeline": 0,
                    "node": "node-1",
                    "pod": "tiny-s1-a0",
                    "exitCode": 1,
                    "reason": "WorkerFailed",
                    "message": "loss is NaN",
                    "step": 7,
                    "logTail": ["Traceback", "x"],
                }
        job = await eventually(lambda: api.job(namespace), state("Failed"))
        assert conditions(job)["Succeeded"] == ("False", "RestartBudgetSpent")
        for word in ("stage 1", "node-1", "exit code 1", "loss is NaN", "Traceback | x", "1 restarts within 3600 s"):
            assert word in message(job, "Succeeded")
        assert [stage["restarts"] for stage in job["status"]["stages"]] == [0, 2, 0]
        reasons = await event_reasons(api, namespace, {"RestartBudgetSpent"})
        assert reasons.count("Restarting") == 1
        assert reasons.count("RestartBudgetSpent") == 1


async def test_pipelines_are_one_gang_and_another_number_of_them_is_another_gang(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    with running(operator()):
        await api.create(JOBS, job_manifest(namespace, stages=2, pipelines=2))
        job = await eventually(lambda: api.job(namespace), state("Running"))
        assert job["status"]["summary"]["stages"] == "4/4"
        assert job["status"]["readyStages"] == 4
        places = [(item["index"], item["pipeline"], item["node"]) for item in job["status"]["stages"]]
        assert places == [(0, 0, "node-0"), (1, 0, "node-1"), (0, 1, "node-2"), (1, 1, "node-3")]
        pods = await eventually(
            lambda: api.pods(namespace),
            lambda pods: all(pod["metadata"]["annotations"][MEMBERSHIP] for pod in pods),
        )
        assert [pod["metadata"]["name"] for pod in pods] == [
            f"tiny-p{pipeline}-s{stage}-a0" for pipeline in range(2) for stage in range(2)
        ]
        last = Membership.model_validate_json(pods[3]["metadata"]["annotations"][MEMBERSHIP])
        assert (last.rank, last.world_size, last.previous_address, last.next_address) == (3, 4, "127.0.0.12", "")
        assert last.master_address == "127.0.0.10"

        await api.set_spec(namespace, pipelines=1)
        pods = await eventually(
            lambda: api.pods(namespace),
            lambda pods: [pod["metadata"]["name"] for pod in pods] == ["tiny-s0-a1", "tiny-s1-a1"],
        )
        job = await eventually(lambda: api.job(namespace), state("Running"))
        assert (job["status"]["restarts"], job["status"]["summary"]["stages"]) == (0, "2/2")


async def test_a_checkpoint_that_cannot_be_written_is_told(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    claim = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
    metadata = {"name": "saves", "namespace": namespace}
    await api.create(CLAIMS, {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": claim})
    words = "the checkpoint of step 150 was not written: no space is left on the volume"
    with running(operator()):
        created = await api.create(JOBS, job_manifest(namespace, checkpoint={"volumeClaimName": "saves"}))
        job = await eventually(lambda: api.job(namespace), state("Running"))
        assert conditions(job)["Checkpointed"] == ("Unknown", "NotSavedYet")
        agent = await _agent(created["metadata"]["uid"], checkpoint_problem=words)
        try:
            job = await eventually(
                lambda: api.job(namespace), lambda job: conditions(job)["Checkpointed"] == ("False", "CheckpointFailed")
            )
        finally:
            await agent.cleanup()
        assert message(job, "Checkpointed") == words
        assert job["status"]["progress"]["lastCheckpointStep"] == 100
        await event_reasons(api, namespace, {"CheckpointFailed"})
