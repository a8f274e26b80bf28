"""A job that serves, against a real API server: its model, its fronts, its life."""

from collections.abc import Callable
from typing import Any

from pipelinejob_operator.runtime.client import CLAIMS, DEPLOYMENTS, JOBS, NETWORK_POLICIES, SERVICES, Resource
from pipelinejob_worker.protocol import Membership, WorkerConfig
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

CONFIG, MEMBERSHIP = "pipelinejob.dev/config", "pipelinejob.dev/membership"
CONFIG_MAPS = Resource("/api/v1", "configmaps")
BUDGETS = Resource("/apis/policy/v1", "poddisruptionbudgets")


def serving(namespace: str, name: str = "served", **spec: Any) -> Manifest:
    made = job_manifest(namespace, name, mode="Serve", model={"fromJob": {"name": "tiny"}}, serve={}, stages=2)
    del made["spec"]["train"]
    made["spec"] |= spec
    return made


async def train(api: Api, namespace: str, step: int) -> None:
    """A job that has saved a step, in the words of its status; it is suspended, so that it has no pods."""
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "weights", "namespace": namespace},
        "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}},
    }
    await api.create(CLAIMS, claim)
    await api.create(JOBS, job_manifest(namespace, checkpoint={"volumeClaimName": "weights"}, suspend=True))
    await saved(api, namespace, step)


async def saved(api: Api, namespace: str, step: int) -> None:
    operations = [{"op": "add", "path": "/status/progress", "value": {"step": step, "lastCheckpointStep": step}}]
    await eventually(lambda: api.job(namespace), state("Suspended"))
    await api.json_patch(JOBS, namespace, "tiny", operations, "status")


async def report_fronts(api: Api, namespace: str, ready: int) -> None:
    """Say of the Deployment what its controller would."""
    operations = [{"op": "add", "path": "/status", "value": {"replicas": ready, "readyReplicas": ready}}]
    await api.json_patch(DEPLOYMENTS, namespace, "served-front", operations, "status")


async def replicas(api: Api, namespace: str) -> int:
    found = await api.get(DEPLOYMENTS, namespace, "served-front")
    return int(found["spec"]["replicas"]) if found else -1


async def test_it_waits_for_its_model_in_words_and_serves_it(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    with running(operator()):
        await api.create(JOBS, serving(namespace))
        job = await eventually(
            lambda: api.job(namespace, "served"),
            lambda job: conditions(job).get("Placed") == ("False", "ModelJobNotFound"),
        )
        assert message(job, "Placed") == (
            f'spec.model.fromJob.name: PipelineJob "tiny" does not exist in namespace "{namespace}"; create it (this '
            "job looks again by itself), or delete this job and name another one"
        )
        await train(api, namespace, step=0)
        job = await eventually(
            lambda: api.job(namespace, "served"),
            lambda job: conditions(job).get("Placed") == ("False", "ModelNotSaved"),
        )
        assert await api.pods(namespace, "served") == []

        await saved(api, namespace, step=50)
        job = await eventually(lambda: api.job(namespace, "served"), state("Running"))
        assert conditions(job)["Available"] == ("False", "FrontsNotReady")
        pods = await api.pods(namespace, "served")
        config = WorkerConfig.model_validate_json(pods[0]["metadata"]["annotations"][CONFIG])
        assert (config.mode, config.source and config.source.job) == ("Serve", "tiny")
        assert config.model.preset is not None


async def test_a_job_without_checkpoints_cannot_be_served(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    with running(operator()):
        await api.create(JOBS, job_manifest(namespace))
        await api.create(JOBS, serving(namespace))
        job = await eventually(
            lambda: api.job(namespace, "served"),
            lambda job: conditions(job).get("Placed") == ("False", "ModelJobUnfit"),
        )
        assert message(job, "Placed") == (
            'spec.model.fromJob.name: PipelineJob "tiny" keeps its weights nowhere; allowed: a job with '
            "spec.checkpoint.volumeClaimName; delete this job and name another one"
        )


async def test_its_fronts_come_and_go_with_it_and_follow_the_spec(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    with running(operator()):
        await train(api, namespace, step=50)
        await api.create(JOBS, serving(namespace, pipelines=2, recovery={"strategy": "RecreateAll"}))
        await eventually(lambda: api.job(namespace, "served"), state("Running"))
        for resource, name in (
            (SERVICES, "served-engine-0"),
            (SERVICES, "served-engine-1"),
            (SERVICES, "served-front"),
            (CONFIG_MAPS, "served-front"),
            (NETWORK_POLICIES, "served-front"),
            (BUDGETS, "served-front"),
        ):
            found = await api.get(resource, namespace, name)
            assert found is not None, name
            assert found["metadata"]["ownerReferences"][0]["kind"] == "PipelineJob"
        assert await replicas(api, namespace) == 2
        pods = await eventually(
            lambda: api.pods(namespace, "served"),
            lambda pods: all(pod["metadata"]["annotations"][MEMBERSHIP] for pod in pods),
        )
        members = [Membership.model_validate_json(pod["metadata"]["annotations"][MEMBERSHIP]) for pod in pods]
        assert len({member.master_address for member in members}) == 2, "each replica is a group of its own"

        await report_fronts(api, namespace, ready=2)
        await api.set_spec(namespace, "served", serve={"fronts": 3})
        await eventually(lambda: replicas(api, namespace), lambda count: count == 3)
        job = await eventually(
            lambda: api.job(namespace, "served"), lambda job: conditions(job)["Available"] == ("True", "Serving")
        )
        assert message(job, "Available") == "2 of 3 fronts and 2 of 2 pipelines are ready"
        assert (job["status"]["readyFronts"], job["status"]["summary"]["fronts"]) == (2, "2/3")

        await api.set_spec(namespace, "served", suspend=True)
        await eventually(lambda: replicas(api, namespace), lambda count: count == 0)
        job = await eventually(lambda: api.job(namespace, "served"), state("Suspended"))
        assert conditions(job)["Available"] == ("False", "Suspended")

        await api.set_spec(namespace, "served", suspend=False)
        await eventually(lambda: replicas(api, namespace), lambda count: count == 3)
        await eventually(lambda: api.job(namespace, "served"), state("Running"))


async def test_fronts_that_cannot_be_made_are_explained(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    with running(operator()):
        await train(api, namespace, step=50)
        await api.create(JOBS, serving(namespace))
        await eventually(lambda: replicas(api, namespace), lambda count: count == 2)
        words = 'pods "served-front-x" is forbidden: exceeded quota: few'
        failure = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": words}
        operations = [{"op": "add", "path": "/status", "value": {"conditions": [failure]}}]
        await api.json_patch(DEPLOYMENTS, namespace, "served-front", operations, "status")
        await eventually(lambda: api.job(namespace, "served"), state("Running"))
        job = await eventually(lambda: api.job(namespace, "served"), lambda job: words in message(job, "Available"))
        assert conditions(job)["Available"] == ("False", "FrontsNotReady")


async def test_jobs_share_a_service_and_each_owns_it(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    shared = {"sharedService": "chat", "modelName": "chat"}
    with running(operator()):
        await train(api, namespace, step=50)
        for name, port in (("served", 8000), ("following", 80)):
            await api.create(JOBS, serving(namespace, name, serve={**shared, "port": port}))
            await eventually(lambda name=name: api.job(namespace, name), state("Running"))
        service = await eventually(
            lambda: api.get(SERVICES, namespace, "chat"),
            lambda found: found is not None and len(found["metadata"]["ownerReferences"]) == 2,
        )
        assert service is not None
        assert {owner["name"] for owner in service["metadata"]["ownerReferences"]} == {"served", "following"}
        assert service["spec"]["selector"] == {"pipelinejob.dev/service": "chat"}
        assert {port["port"] for port in service["spec"]["ports"]} == {80, 8000}


async def test_a_service_of_somebody_else_is_not_shared(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    theirs = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "chat", "namespace": namespace},
        "spec": {"selector": {"app": "theirs"}, "ports": [{"port": 80}]},
    }
    with running(operator()):
        await train(api, namespace, step=50)
        await api.create(SERVICES, theirs)
        await api.create(JOBS, serving(namespace, serve={"sharedService": "chat"}))
        job = await eventually(
            lambda: api.job(namespace, "served"), lambda job: conditions(job).get("Placed") == ("False", "NameTaken")
        )
        assert "Service chat" in message(job, "Placed") and "belongs to nobody" in message(job, "Placed")
        found = await api.get(SERVICES, namespace, "chat")
        assert found is not None
        assert found["spec"]["selector"] == {"app": "theirs"}
