"""The user's switches: suspend, stages, deadline, time to live, deletion; and that nothing is written for nothing."""

from collections.abc import Callable

from pipelinejob_operator.runtime.client import EVENTS, JOBS, NETWORK_POLICIES, PODS, SERVICES
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


def names(pods: list[dict[str, dict[str, str]]]) -> list[str]:
    return [pod["metadata"]["name"] for pod in pods]


async def test_a_suspended_job_lets_its_pods_go_and_resumes_with_the_next_attempt(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    with running(operator()):
        await api.create(JOBS, job_manifest(namespace))
        started = await eventually(lambda: api.job(namespace), state("Running"))
        kubelet.buries = False
        await api.set_spec(namespace, suspend=True)
        await eventually(lambda: api.job(namespace), state("Stopping"))
        pods = await eventually(
            lambda: api.pods(namespace),
            lambda pods: all("deletionTimestamp" in pod["metadata"] for pod in pods),
        )
        assert [pod["metadata"]["deletionGracePeriodSeconds"] for pod in pods] == [30, 30, 30]
        kubelet.buries = True
        job = await eventually(lambda: api.job(namespace), state("Suspended"))
        assert conditions(job)["Suspended"] == ("True", "Suspended")
        assert "startTime" not in job["status"]
        assert await api.pods(namespace) == []

        await api.set_spec(namespace, suspend=False)
        job = await eventually(lambda: api.job(namespace), state("Running"))
        assert names(await api.pods(namespace)) == ["tiny-s0-a1", "tiny-s1-a1", "tiny-s2-a1"]
        assert job["status"]["startTime"] >= started["status"]["startTime"]
        assert job["status"]["restarts"] == 0


async def test_another_number_of_stages_replaces_the_gang_and_is_no_failure(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    with running(operator()):
        await api.create(JOBS, job_manifest(namespace))
        await eventually(lambda: api.job(namespace), state("Running"))
        await api.set_spec(namespace, stages=2)
        await eventually(lambda: api.pods(namespace), lambda pods: names(pods) == ["tiny-s0-a1", "tiny-s1-a1"])
        job = await eventually(lambda: api.job(namespace), state("Running"))
        assert job["status"]["summary"]["stages"] == "2/2"
        assert job["status"]["restarts"] == 0


async def test_a_job_that_outlives_its_deadline_fails_and_its_running_pods_go(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    with running(operator()):
        await api.create(JOBS, job_manifest(namespace, activeDeadlineSeconds=3))
        job = await eventually(lambda: api.job(namespace), state("Failed"))
        assert conditions(job)["Succeeded"] == ("False", "DeadlineExceeded")
        await eventually(lambda: api.pods(namespace), lambda pods: pods == [])


async def test_a_finished_job_is_deleted_when_its_time_to_live_is_over(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    with running(operator()):
        spec = job_manifest(namespace, ttlSecondsAfterFinished=2, podCleanupPolicy="All")
        await api.create(JOBS, spec)
        await eventually(lambda: api.job(namespace), state("Running"))
        for pod in await api.pods(namespace):
            await kubelet.end(pod, 0)
        await eventually(lambda: api.pods(namespace), lambda pods: pods == [])
        await eventually(lambda: api.get(JOBS, namespace, "tiny"), lambda job: job is None)


async def test_everything_that_a_job_consists_of_goes_with_it(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    """No garbage collector runs here: what it goes by is the controller's owner reference on every object."""
    with running(operator()):
        created = await api.create(JOBS, job_manifest(namespace))
        await eventually(lambda: api.job(namespace), state("Running"))
        assert "finalizers" not in (await api.job(namespace))["metadata"]
        uid = created["metadata"]["uid"]
        children = [
            child for resource in (PODS, SERVICES, NETWORK_POLICIES) for child in await api.items(resource, namespace)
        ]
        assert len(children) == 3 + 1 + 1
        for child in children:
            owner = {
                "apiVersion": "pipelinejob.dev/v1alpha1",
                "kind": "PipelineJob",
                "name": "tiny",
                "uid": uid,
                "controller": True,
                "blockOwnerDeletion": True,
            }
            assert child["metadata"]["ownerReferences"] == [owner]


async def test_a_job_of_the_same_name_as_a_deleted_one_does_not_take_its_pods(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    with running(operator()):
        old = await api.create(JOBS, job_manifest(namespace))
        await eventually(lambda: api.job(namespace), state("Running"))
        await api.delete(JOBS, namespace, "tiny", old["metadata"]["uid"])
        new = await api.create(JOBS, job_manifest(namespace))
        job = await eventually(
            lambda: api.job(namespace), lambda job: conditions(job).get("Placed") == ("False", "NameTaken")
        )
        assert job["metadata"]["uid"] == new["metadata"]["uid"]
        for resource in (PODS, SERVICES, NETWORK_POLICIES):  # what the garbage collector would do
            for child in await api.items(resource, namespace):
                await api.force_delete(resource, namespace, child["metadata"]["name"])
        await eventually(lambda: api.job(namespace), state("Running"))
        owners = {pod["metadata"]["ownerReferences"][0]["uid"] for pod in await api.pods(namespace)}
        assert owners == {new["metadata"]["uid"]}


async def test_nothing_is_written_while_nothing_changes(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    with running(operator(PIPELINEJOB_RELIST_SECONDS="0.5")) as process:
        await api.create(JOBS, job_manifest(namespace))
        await eventually(lambda: api.job(namespace), state("Running"))
        await eventually(
            lambda: api.pods(namespace),
            lambda pods: all(pod["metadata"]["annotations"]["pipelinejob.dev/membership"] for pod in pods),
        )

        async def everything() -> list[tuple[str, str]]:
            found = [
                item
                for resource in (JOBS, PODS, SERVICES, NETWORK_POLICIES, EVENTS)
                for item in await api.items(resource, namespace)
            ]
            return sorted((item["metadata"]["name"], item["metadata"]["resourceVersion"]) for item in found)

        reconciles = 'pipelinejob_operator_reconciles_total{outcome="done"}'
        await eventually(lambda: process.metric("pipelinejob_operator_queue_depth"), lambda depth: depth == 0)
        before, count = await everything(), await process.metric(reconciles)
        await eventually(lambda: process.metric(reconciles), lambda now: now >= count + 5)
        assert await everything() == before
        assert await process.metric('pipelinejob_operator_reconciles_total{outcome="error"}') == 0
