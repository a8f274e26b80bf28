"""What the cluster refuses becomes a condition with a cure, and nothing is held meanwhile."""

from collections.abc import Callable
from typing import Any

from pipelinejob_operator.runtime.client import CLAIMS, JOBS, PODS, Resource
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

QUOTAS = Resource("/api/v1", "resourcequotas")


def placed(reason: str) -> Callable[[Manifest], bool]:
    return lambda job: conditions(job).get("Placed") == ("False", reason)


async def test_a_quota_that_refuses_half_of_the_pods_holds_none_and_the_job_starts_once_it_is_raised(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    await set_quota(api, namespace, 2)
    with running(operator()):
        await api.create(JOBS, job_manifest(namespace))
        job = await eventually(lambda: api.job(namespace), placed("QuotaExceeded"))
        for word in ("exceeded quota: few", "limited: pods=2", "raise the ResourceQuota"):
            assert word in message(job, "Placed")
        await eventually(lambda: api.pods(namespace), lambda pods: pods == [])
        assert job["status"]["summary"]["state"] == "Pending"

        await set_quota(api, namespace, 10)
        await eventually(lambda: api.job(namespace), state("Running"))


async def set_quota(api: Api, namespace: str, pods: int) -> None:
    """Set a quota and its status, which a controller computes in a real cluster."""
    hard = {"pods": str(pods)}
    if await api.get(QUOTAS, namespace, "few") is None:
        await api.create(QUOTAS, {"metadata": {"name": "few", "namespace": namespace}, "spec": {"hard": hard}})
    else:
        await api.json_patch(QUOTAS, namespace, "few", [{"op": "replace", "path": "/spec/hard", "value": hard}])
    status = {"hard": hard, "used": {"pods": "0"}}
    await api.json_patch(QUOTAS, namespace, "few", [{"op": "add", "path": "/status", "value": status}], "status")


async def test_pod_security_that_refuses_the_template_is_named(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    label = {"pod-security.kubernetes.io/enforce": "restricted"}
    await api.json_patch(
        Resource("/api/v1", "namespaces"), "", namespace, [{"op": "add", "path": "/metadata/labels", "value": label}]
    )
    with running(operator()):
        await api.create(JOBS, job_manifest(namespace, "plain"))
        await eventually(lambda: api.job(namespace, "plain"), state("Running"))
        privileged = {"name": "worker", "securityContext": {"privileged": True}}
        template = {"spec": {"containers": [privileged]}}
        await api.create(JOBS, job_manifest(namespace, template=template))
        job = await eventually(lambda: api.job(namespace), placed("PodSecurityViolation"))
        assert "privileged" in message(job, "Placed")


async def test_a_missing_claim_creates_no_pod_until_it_exists(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    with running(operator()):
        await api.create(JOBS, job_manifest(namespace, checkpoint={"volumeClaimName": "saves"}))
        job = await eventually(lambda: api.job(namespace), placed("VolumeClaimNotFound"))
        assert 'claim "saves" does not exist' in message(job, "Placed")
        assert await api.pods(namespace) == []
        await api.create(CLAIMS, claim(namespace, "ReadWriteMany"))
        await eventually(lambda: api.job(namespace), state("Running"))


async def test_a_read_write_once_claim_keeps_all_stages_on_one_node_and_says_so_when_none_has_room(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    kubelet.binds = False
    await api.create(CLAIMS, claim(namespace, "ReadWriteOnce"))
    with running(operator()):
        await api.create(JOBS, job_manifest(namespace, checkpoint={"volumeClaimName": "saves"}))
        pods = await eventually(
            lambda: api.pods(namespace),
            lambda pods: len(pods) == 3 and not any("schedulingGates" in pod["spec"] for pod in pods),
        )
        for pod in pods:
            (term,) = pod["spec"]["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
            assert term["topologyKey"] == "kubernetes.io/hostname"
        await unschedulable(api, namespace, pods[1], "0/4 nodes are available: 4 Insufficient nvidia.com/gpu.")
        job = await eventually(lambda: api.job(namespace), placed("Unschedulable"))
        for word in ("stage 1: 0/4 nodes are available", 'claim "saves" is ReadWriteOnce', "ReadWriteMany claim"):
            assert word in message(job, "Placed")


async def unschedulable(api: Api, namespace: str, pod: Manifest, text: str) -> None:
    condition = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": text,
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
    operations = [{"op": "add", "path": "/status/conditions", "value": [condition]}]
    await api.json_patch(PODS, namespace, pod["metadata"]["name"], operations, "status")


def claim(namespace: str, mode: str) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "saves", "namespace": namespace},
        "spec": {"accessModes": [mode], "resources": {"requests": {"storage": "1Gi"}}},
    }


async def test_an_image_that_cannot_be_pulled_is_named_with_its_stage_and_node(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    kubelet.starts = False
    with running(operator()):
        await api.create(JOBS, job_manifest(namespace))
        pods = await eventually(
            lambda: api.pods(namespace),
            lambda pods: [pod["spec"].get("nodeName") for pod in pods].count(None) == 0 and pods,
        )
        waiting: dict[str, Any] = {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}}
        await kubelet.report(pods[2], phase="Pending", ready=False, state=waiting)
        job = await eventually(
            lambda: api.job(namespace),
            lambda job: conditions(job).get("Running") == ("False", "ImagePullFailed"),
        )
        for word in ("stage 2 on node node-2", "worker:test", "ImagePullBackOff", "imagePullSecrets"):
            assert word in message(job, "Running")
        assert job["status"]["summary"]["state"] == "Starting"


async def test_a_model_with_fewer_layers_than_stages_is_not_accepted_until_it_is_mended(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    with running(operator()):
        train = job_manifest(namespace)["spec"]["train"] | {"schedule": {"name": "GPipe"}}
        await api.create(JOBS, job_manifest(namespace, stages=11, train=train))
        job = await eventually(lambda: api.job(namespace), state("Refused"))
        assert conditions(job)["Accepted"] == ("False", "TooFewLayers")
        assert "spec.stages: 11 stages for a model of 8 layers" in message(job, "Accepted")
        assert await api.pods(namespace) == []
        await api.set_spec(namespace, stages=10)
        await eventually(lambda: api.job(namespace), state("Running"))
