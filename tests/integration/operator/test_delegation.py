"""Delegated jobs on a real API server, which takes what each scheduler is shown; and life with Kueue's gate.

The schedulers themselves do not run here; ``tests/e2e/test_delegation.py`` has kube-scheduler's gangs for real.
"""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pipelinejob_operator.runtime.client import JOBS, PODS, Resource
from tests.cluster.control_plane import Configuration, ControlPlane
from tests.integration.operator.conftest import install
from tests.integration.operator.harness import (
    Api,
    Kubelet,
    Operator,
    conditions,
    eventually,
    job_manifest,
    message,
    running,
    state,
)
from tests.integration.operator.rights import POD_GROUPS, bindings
from tests.integration.operator.schedulers import KINDS, KUEUE_GATE, kueue_webhook

ALL = {"PIPELINEJOB_SCHEDULERS": "PodGroup,Volcano,SchedulerPlugins"}
NATIVE = Configuration(feature_gates={"GenericWorkload": True}, runtime_config=("scheduling.k8s.io/v1beta1=true",))


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """An API server with gangs, and with the kinds of schedulers that are not there."""
    with ControlPlane(tmp_path_factory.mktemp("schedulers"), configuration=NATIVE) as made:
        asyncio.run(_install(made))
        yield made


async def _install(plane: ControlPlane) -> None:
    await install(plane)
    api = await Api.open(plane.kubeconfig)
    try:
        for definition in KINDS:
            await api.post("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", definition)
        for path, manifest in (*bindings("operator-of-one-namespace", POD_GROUPS, "pod-groups"), *kueue_webhook()):
            await api.post(path, manifest)
        for group in ("kueue.x-k8s.io/v1beta2", "scheduling.volcano.sh/v1beta1", "scheduling.x-k8s.io/v1alpha1"):
            await eventually(lambda group=group: api.resources(group), bool)
    finally:
        await api.close()


def delegated(namespace: str, to: str, queue: str = "", **spec: Any) -> dict[str, Any]:
    placement = {"strategy": "Delegated", "delegated": {"to": to, "queueName": queue}}
    return job_manifest(namespace, placement=placement, **spec)


@pytest.mark.parametrize(
    ("to", "version", "spec", "words"),
    [
        (
            "PodGroup",
            "scheduling.k8s.io/v1beta1",
            {"schedulingPolicy": {"gang": {"minCount": 3}}, "disruptionMode": {"all": {}}},
            "kube-scheduler places all or none, as PodGroup tiny (scheduling.k8s.io/v1beta1)",
        ),
        (
            "Auto",
            "scheduling.k8s.io/v1beta1",
            {"schedulingPolicy": {"gang": {"minCount": 3}}, "disruptionMode": {"all": {}}},
            "kube-scheduler places all or none, as PodGroup tiny (scheduling.k8s.io/v1beta1)",
        ),
        (
            "Volcano",
            "scheduling.volcano.sh/v1beta1",
            {"minMember": 3},
            "Volcano places all or none, as PodGroup tiny (scheduling.volcano.sh/v1beta1)",
        ),
        (
            "SchedulerPlugins",
            "scheduling.x-k8s.io/v1alpha1",
            {"minMember": 3},
            "scheduler-plugins places all or none, as PodGroup tiny (scheduling.x-k8s.io/v1alpha1)",
        ),
    ],
)
async def test_the_pod_group_is_taken_and_the_job_runs(
    to: str,
    version: str,
    spec: dict[str, Any],
    words: str,
    api: Api,
    namespace: str,
    kubelet: Kubelet,
    operator: Callable[..., Operator],
) -> None:
    with running(operator(**ALL)):
        await api.create(JOBS, delegated(namespace, to))
        job = await eventually(lambda: api.job(namespace), state("Running"))
        (group,) = await api.items(Resource(f"/apis/{version}", "podgroups"), namespace)
        assert {key: group["spec"][key] for key in spec} == spec
        assert group["metadata"]["ownerReferences"][0]["uid"] == job["metadata"]["uid"]
        assert message(job, "Placed") == f"all 3 stages have a node; {words}"


async def test_kube_scheduler_can_tell_from_the_pod_which_gang_it_is_of(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    """The field is dropped without a word where the feature gate is off."""
    with running(operator(**ALL)):
        await api.create(JOBS, delegated(namespace, "PodGroup"))
        pods = await eventually(lambda: api.pods(namespace), lambda pods: len(pods) == 3)
        assert [pod["spec"]["schedulingGroup"] for pod in pods] == [{"podGroupName": "tiny"}] * 3


async def test_other_stages_are_another_size_of_the_gang(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    groups = Resource("/apis/scheduling.k8s.io/v1beta1", "podgroups")
    with running(operator(**ALL)):
        await api.create(JOBS, delegated(namespace, "PodGroup"))
        await eventually(lambda: api.job(namespace), state("Running"))
        await api.set_spec(namespace, stages=2)
        await eventually(
            lambda: api.get(groups, namespace, "tiny"),
            lambda group: group["spec"]["schedulingPolicy"] == {"gang": {"minCount": 2}},
        )


async def test_without_the_rights_there_is_no_pod_and_the_value_of_the_chart_is_named(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    with running(operator()):
        await api.create(JOBS, delegated(namespace, "Volcano"))
        job = await eventually(
            lambda: api.job(namespace),
            lambda job: conditions(job).get("Placed") == ("False", "SchedulerNotAllowed"),
        )
        assert "add Volcano to the chart's value schedulers" in message(job, "Placed")
        assert await api.pods(namespace) == []


async def test_without_the_rights_auto_is_affinity(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    with running(operator()):
        await api.create(JOBS, delegated(namespace, "Auto"))
        job = await eventually(lambda: api.job(namespace), state("Running"))
        assert message(job, "Placed").endswith("neighbours drawn together by affinity")


async def admit(api: Api, namespace: str) -> None:
    """Do as Kueue does when a job's turn has come."""
    for pod in await api.pods(namespace):
        gates = [gate["name"] for gate in pod["spec"].get("schedulingGates", [])]
        if KUEUE_GATE in gates:
            path = f"/spec/schedulingGates/{gates.index(KUEUE_GATE)}"
            await api.json_patch(PODS, namespace, pod["metadata"]["name"], [{"op": "remove", "path": path}])


async def test_a_job_waits_for_kueue_and_its_suspended_pods_do_not_wait_for_others(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    with running(operator()):
        await api.create(JOBS, delegated(namespace, "Kueue", "team-a"))
        job = await eventually(
            lambda: api.job(namespace), lambda job: conditions(job).get("Placed") == ("False", "Held")
        )
        assert message(job, "Placed") == (
            f"3 of 3 stages wait behind the scheduling gate {KUEUE_GATE}; Kueue admits them as one pod group of "
            "LocalQueue team-a"
        )
        await admit(api, namespace)
        await eventually(lambda: api.job(namespace), state("Running"))

        kubelet.buries = False
        await api.set_spec(namespace, suspend=True)
        leaving = await eventually(
            lambda: api.pods(namespace),
            lambda pods: all("deletionTimestamp" in pod["metadata"] for pod in pods),
        )
        assert all(pod["metadata"]["finalizers"] == ["kueue.x-k8s.io/managed"] for pod in leaving)
        for pod in leaving:
            await kubelet.end(pod, 79)
        kubelet.buries = True
        await eventually(lambda: api.job(namespace), state("Suspended"))
        assert await api.pods(namespace) == []

        await api.set_spec(namespace, suspend=False)
        pods = await eventually(lambda: api.pods(namespace), lambda pods: len(pods) == 3)
        assert {pod["metadata"]["labels"]["kueue.x-k8s.io/pod-group-name"] for pod in pods} == {"tiny-a1"}


async def test_a_job_that_is_suspended_before_its_turn_leaves_the_queue(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    with running(operator()):
        await api.create(JOBS, delegated(namespace, "Kueue", "team-a"))
        await eventually(lambda: api.job(namespace), lambda job: conditions(job).get("Placed") == ("False", "Held"))
        await api.set_spec(namespace, suspend=True)
        await eventually(lambda: api.job(namespace), state("Suspended"))
        assert await api.pods(namespace) == []
