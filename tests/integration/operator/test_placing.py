"""Plans against a real API server: what a gated pod lets be changed, who gets nodes, and who is taken back."""

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import pytest

from pipelinejob_operator.build.opening import Opened, opening
from pipelinejob_operator.placement.pods import node_of
from pipelinejob_operator.runtime.client import CLAIMS, DEVICE_CLASSES, JOBS, PODS, VOLUMES, ApiError
from tests.integration.operator.harness import (
    Api,
    Kubelet,
    Manifest,
    Operator,
    eventually,
    job_manifest,
    message,
    running,
    state,
)
from tests.integration.operator.nodes import GPU, RACK, Nodes, all_finish, finish, pinned, says, short, wants

REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"


@pytest.fixture
async def nodes(api: Api, namespace: str) -> AsyncIterator[Nodes]:
    made = Nodes(api, namespace)
    yield made
    await made.clear()


class TestGatedPods:
    """KEP-3838, as the API server has it."""

    @pytest.mark.parametrize(
        "terms",
        [
            None,
            [{"matchExpressions": [{"key": "gpu", "operator": "Exists"}]}],
            [
                {"matchExpressions": [{"key": "gpu", "operator": "Exists"}]},
                {"matchFields": [{"key": "metadata.name", "operator": "NotIn", "values": ["bad"]}]},
            ],
            [{}, {"matchExpressions": [{"key": "gpu", "operator": "Exists"}]}],
        ],
    )
    async def test_one_patch_pins_a_pod_and_opens_its_gate_whatever_its_affinity(
        self, api: Api, namespace: str, terms: list[Manifest] | None
    ) -> None:
        affinity = {"nodeAffinity": {REQUIRED: {"nodeSelectorTerms": terms}}} if terms else None
        made = await api.create(PODS, self.pod(namespace, affinity=affinity))
        todo = opening(made, Opened.model_validate({"at": "2026-01-01T12:00:00Z", "node": "node-7"}))
        patched = await api.json_patch(PODS, namespace, todo.name, list(todo.operations))
        assert "schedulingGates" not in patched["spec"]
        assert node_of(patched) == "node-7"
        with pytest.raises(ApiError) as again:  # the gate is open: this would be a second answer
            await api.json_patch(PODS, namespace, todo.name, list(todo.operations))
        assert again.value.code == 422

    async def test_an_open_pod_cannot_be_pinned_elsewhere_so_a_gang_is_planned_anew_with_new_pods(
        self, api: Api, namespace: str
    ) -> None:
        made = await api.create(PODS, self.pod(namespace))
        todo = opening(made, Opened.model_validate({"at": "2026-01-01T12:00:00Z", "node": "node-7"}))
        patched = await api.json_patch(PODS, namespace, todo.name, list(todo.operations))
        terms = patched["spec"]["affinity"]["nodeAffinity"][REQUIRED]["nodeSelectorTerms"]
        terms[0]["matchFields"][0]["values"] = ["node-8"]
        operations = [{"op": "replace", "path": "/spec/affinity", "value": patched["spec"]["affinity"]}]
        with pytest.raises(ApiError, match="is invalid"):
            await api.json_patch(PODS, namespace, todo.name, operations)

    def pod(self, namespace: str, **spec: Any) -> Manifest:
        given = {key: value for key, value in spec.items() if value}
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "gated", "namespace": namespace, "annotations": {"a": "b"}},
            "spec": {
                "containers": [{"name": "c", "image": "i"}],
                "schedulingGates": [{"name": "pipelinejob.dev/gang"}],
                **given,
            },
        }


async def test_a_chain_is_laid_with_the_fewest_crossings_and_the_status_shows_it(
    api: Api, namespace: str, kubelet: Kubelet, nodes: Nodes, operator: Callable[..., Operator]
) -> None:
    for name, gpus, rack in (("b1", 1, "b"), ("a1", 2, "a"), ("b2", 2, "b"), ("a2", 2, "a")):
        await nodes.add(name, gpus, rack)
    with running(operator(everywhere=True)):
        await api.create(JOBS, wants(namespace, stages=4))
        job = await eventually(lambda: api.job(namespace), state("Running"))
        assert pinned(namespace, await api.pods(namespace)) == ["a1", "a1", "a2", "a2"]
        assert (
            message(job, "Placed") == f"all 4 stages have a node; links that cross {RACK} 0, kubernetes.io/hostname 1"
        )
        job = await eventually(lambda: api.job(namespace), lambda job: job["status"]["placement"]["strategy"])
        assert job["status"]["placement"] == {
            "strategy": "Planned",
            "crossings": [
                {"level": RACK, "count": 0, "betweenPipelines": 0},
                {"level": "kubernetes.io/hostname", "count": 1, "betweenPipelines": 0},
            ],
            "cost": "1",
        }
        assert [stage["domains"] for stage in job["status"]["stages"]] == [["a"]] * 4
        assert job["status"]["summary"]["crossings"] == "0/1"


async def test_of_two_jobs_that_want_everything_one_runs_after_the_other_and_never_half_of_each(
    api: Api, namespace: str, kubelet: Kubelet, nodes: Nodes, operator: Callable[..., Operator]
) -> None:
    for name in ("n1", "n2"):
        await nodes.add(name, 2)
    opened: set[tuple[str, ...]] = set()

    async def watch() -> None:
        while True:
            jobs = {name: await api.pods(namespace, name) for name in ("first", "second")}
            opened.add(tuple(sorted(name for name, pods in jobs.items() if pinned(namespace, pods))))
            await asyncio.sleep(0.02)

    with running(operator(everywhere=True)):
        watching = asyncio.create_task(watch())
        spec: dict[str, Any] = {"stages": 4, "placement": {}}
        await api.create(JOBS, wants(namespace, "first", **spec))
        await eventually(lambda: api.job(namespace, "first"), says("Placed", "True", "AllStagesPlaced"))
        await api.create(JOBS, wants(namespace, "second", **spec))
        job = await eventually(lambda: api.job(namespace, "second"), says("Placed", "False", "NoPlanFits"))
        assert "0 of 4 stages fit: nvidia.com/gpu is short by 4" in message(job, "Placed")
        assert job["status"]["summary"]["state"] == "Pending"

        await finish(api, kubelet, namespace, "first")
        await eventually(lambda: api.job(namespace, "second"), says("Placed", "True", "AllStagesPlaced"), seconds=10)
        await finish(api, kubelet, namespace, "second")
        await eventually(lambda: api.job(namespace, "second"), state("Succeeded"))
        watching.cancel()
    # The pods of the first keep their pins after their end; what counts is that the second has none before.
    assert opened <= {(), ("first",), ("first", "second")}


async def test_small_jobs_do_not_overtake_a_large_one_that_waits(
    api: Api, namespace: str, kubelet: Kubelet, nodes: Nodes, operator: Callable[..., Operator]
) -> None:
    await nodes.add("n1", 2)
    spec: dict[str, Any] = {"placement": {}}
    with running(operator(everywhere=True)):
        await api.create(JOBS, wants(namespace, "running", stages=1, **spec))
        await eventually(lambda: api.job(namespace, "running"), says("Placed", "True", "AllStagesPlaced"))
        await api.create(JOBS, wants(namespace, "large", stages=2, **spec))
        await eventually(lambda: api.job(namespace, "large"), says("Placed", "False", "NoPlanFits"))
        await api.create(JOBS, wants(namespace, "small", stages=1, **spec))
        job = await eventually(lambda: api.job(namespace, "small"), says("Placed", "False", "WaitingForTurn"))
        assert f"reserved for {namespace}/large" in message(job, "Placed")
        await finish(api, kubelet, namespace, "running")
        await eventually(lambda: api.job(namespace, "large"), says("Placed", "True", "AllStagesPlaced"))
        assert pinned(namespace, await api.pods(namespace, "small")) == []


async def test_twenty_jobs_at_once_on_a_cluster_that_holds_eight_all_finish(
    api: Api, namespace: str, kubelet: Kubelet, nodes: Nodes, operator: Callable[..., Operator]
) -> None:
    """Each has four stages on hosts of two: it gets two whole hosts, or one and two halves, never a part of that."""
    await asyncio.gather(*(nodes.add(f"n{number}", 2, f"r{number % 4}") for number in range(16)))
    names = [f"job-{number}" for number in range(20)]
    with running(operator(everywhere=True)):
        await asyncio.gather(*(api.create(JOBS, wants(namespace, name, stages=4)) for name in names))
        busiest = await all_finish(api, kubelet, namespace, names, per_node=2)
        assert busiest > 16, "many run at once"


async def test_a_cordoned_node_takes_no_stage_until_it_is_back(
    api: Api, namespace: str, kubelet: Kubelet, nodes: Nodes, operator: Callable[..., Operator]
) -> None:
    await nodes.add("n1", 2)
    await nodes.add("n2", 2)
    await nodes.set("n2", "/spec/unschedulable", True)
    with running(operator(everywhere=True)):
        await api.create(JOBS, wants(namespace, placement={}))
        job = await eventually(lambda: api.job(namespace), says("Placed", "False", "NoPlanFits"))
        assert "1 cordoned" in message(job, "Placed")
        await nodes.set("n2", "/spec/unschedulable", False)
        await eventually(lambda: api.job(namespace), state("Running"), seconds=10)
        assert set(pinned(namespace, await api.pods(namespace))) == {"n1", "n2"}


async def test_other_pods_count_bound_or_nominated_or_only_pinned(
    api: Api, namespace: str, kubelet: Kubelet, nodes: Nodes, operator: Callable[..., Operator]
) -> None:
    for name in ("n1", "n2", "n3", "n4"):
        await nodes.add(name, 3)
    kubelet.binds = False
    field = {"key": "metadata.name", "operator": "In", "values": [nodes.name("n2")]}
    pin = {"nodeAffinity": {REQUIRED: {"nodeSelectorTerms": [{"matchFields": [field]}]}}}
    taken = {"requests": {GPU: "1"}, "limits": {GPU: "1"}}
    others: dict[str, Manifest] = {
        "bound": {"nodeName": nodes.name("n1")},
        "pinned": {"affinity": pin},
        "nominated": {},
    }
    tolerations = [{"key": "test", "operator": "Exists"}]
    elsewhere = f"{namespace}-other"
    await api.post("/api/v1/namespaces", {"metadata": {"name": elsewhere}})
    for name, spec in others.items():
        pod = {"containers": [{"name": "c", "image": "i", "resources": taken}], "tolerations": tolerations} | spec
        await api.create(PODS, {"metadata": {"name": name, "namespace": elsewhere}, "spec": pod})
    nominated = [{"op": "add", "path": "/status/nominatedNodeName", "value": nodes.name("n3")}]
    await api.json_patch(PODS, elsewhere, "nominated", nominated, "status")
    with running(operator(everywhere=True)):
        await api.create(JOBS, wants(namespace, placement={"requiredLevel": "kubernetes.io/hostname"}))
        pods = await eventually(lambda: api.pods(namespace), lambda pods: len(pinned(namespace, pods)) == 3)
        assert pinned(namespace, pods) == ["n4"] * 3


async def test_a_gang_whose_stage_is_refused_by_a_kubelet_is_planned_anew_without_that_node(
    api: Api, namespace: str, kubelet: Kubelet, nodes: Nodes, operator: Callable[..., Operator]
) -> None:
    for name, rack in (("a1", "a"), ("b1", "b")):
        await nodes.add(name, 3, rack)
    kubelet.starts = False
    with running(operator(everywhere=True)):
        await api.create(JOBS, wants(namespace))
        pods = await eventually(
            lambda: api.pods(namespace),
            lambda pods: len(pods) == 3 and all(pod["spec"].get("nodeName") for pod in pods),
        )
        assert pinned(namespace, pods) == ["a1"] * 3
        words = "Pod was rejected: Allocate failed due to no healthy devices present"
        refused = {"phase": "Failed", "reason": "UnexpectedAdmissionError", "message": words}
        name = pods[1]["metadata"]["name"]
        await api.json_patch(PODS, namespace, name, [{"op": "add", "path": "/status", "value": refused}], "status")
        kubelet.starts = True
        job = await eventually(
            lambda: api.job(namespace),
            lambda job: job["status"]["attempt"] == 1 and state("Running")(job),
        )
        assert pinned(namespace, await api.pods(namespace)) == ["b1"] * 3
        assert job["status"]["restarts"] == 0, "nothing has failed"
        assert job["status"]["placement"]["strategy"] == "Planned"


async def test_a_gang_that_the_scheduler_refuses_is_taken_back_within_seconds(
    api: Api, namespace: str, kubelet: Kubelet, nodes: Nodes, operator: Callable[..., Operator]
) -> None:
    for name in ("n1", "n2"):
        await nodes.add(name, 3)
    kubelet.binds = False
    with running(operator(everywhere=True)):
        await api.create(JOBS, wants(namespace, placement={}))
        pods = await eventually(lambda: api.pods(namespace), lambda pods: len(pinned(namespace, pods)) == 3)
        no = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "volume limit"}
        for pod in pods:
            operations = [{"op": "add", "path": "/status/conditions", "value": [no]}]
            await api.json_patch(PODS, namespace, pod["metadata"]["name"], operations, "status")
        job = await eventually(lambda: api.job(namespace), says("Placed", "False", "Unschedulable"))
        assert "volume limit" in message(job, "Placed")
        pods = await eventually(
            lambda: api.pods(namespace),
            lambda pods: len(pinned(namespace, pods)) == 3 and pods[0]["metadata"]["name"] == "tiny-s0-a1",
            seconds=30,
        )
        assert pinned(namespace, pods) == ["n2"] * 3


async def test_a_bound_volume_decides_where_the_stages_can_be(
    api: Api, namespace: str, kubelet: Kubelet, nodes: Nodes, operator: Callable[..., Operator]
) -> None:
    for name, rack in (("a1", "a"), ("b1", "b")):
        await nodes.add(name, 3, rack)
    volume = f"{namespace}-volume"
    reach = {"nodeSelectorTerms": [{"matchExpressions": [{"key": RACK, "operator": "In", "values": ["b"]}]}]}
    spec: Manifest = {"accessModes": ["ReadWriteMany"], "capacity": {"storage": "1Gi"}}
    source = {"hostPath": {"path": "/nowhere"}, "nodeAffinity": {"required": reach}}
    await api.post("/api/v1/persistentvolumes", {"metadata": {"name": volume}, "spec": spec | source})
    claim = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}, "volumeName": volume}
    await api.create(CLAIMS, {"metadata": {"name": "saves", "namespace": namespace}, "spec": claim})
    assert await api.get(VOLUMES, "", volume)
    with running(operator(everywhere=True)):
        await api.create(JOBS, wants(namespace, checkpoint={"volumeClaimName": "saves"}))
        pods = await eventually(lambda: api.pods(namespace), lambda pods: len(pinned(namespace, pods)) == 3)
        assert pinned(namespace, pods) == ["b1"] * 3


async def test_devices_behind_a_device_class_are_left_to_kube_scheduler(
    api: Api, namespace: str, kubelet: Kubelet, nodes: Nodes, operator: Callable[..., Operator]
) -> None:
    name = f"{namespace}.example.com"
    resource = f"example.com/{namespace}"
    spec = {"selectors": [{"cel": {"expression": "true"}}], "extendedResourceName": resource}
    made = await api.post("/apis/resource.k8s.io/v1/deviceclasses", {"metadata": {"name": name}, "spec": spec})
    try:
        with running(operator(everywhere=True)):
            await api.create(JOBS, wants(namespace, placement={}, gpu={"resourceName": resource}))
            job = await eventually(lambda: api.job(namespace), state("Running"))
            assert "a DeviceClass stands behind the devices" in message(job, "Placed")
            assert pinned(namespace, await api.pods(namespace)) == ["nowhere"] * 3
    finally:
        await api.delete(DEVICE_CLASSES, "", name, made["metadata"]["uid"])


async def test_provisioned_pods_are_let_go_unplanned_and_taken_back_when_no_node_comes(
    api: Api, namespace: str, kubelet: Kubelet, nodes: Nodes, operator: Callable[..., Operator]
) -> None:
    await nodes.add("n1", 2)
    kubelet.binds = False
    with running(operator(everywhere=True)):
        placement = {"whenInfeasible": "Provision", "provisionTimeoutSeconds": 10}
        await api.create(JOBS, wants(namespace, placement=placement))
        await eventually(lambda: api.job(namespace), says("Placed", "False", "Provisioning"))
        assert pinned(namespace, await api.pods(namespace)) == ["nowhere"] * 3
        # Taken back, and for now it waits like all others, so that it does not hold half of what it wants for ever.
        await eventually(lambda: api.job(namespace), says("Placed", "False", "NoPlanFits"), seconds=30)
        assert pinned(namespace, await api.pods(namespace)) == []
        await nodes.add("n2", 2)
        await eventually(lambda: api.pods(namespace), lambda pods: set(pinned(namespace, pods)) == {"n1", "n2"})


async def test_a_level_that_no_node_has_makes_no_pod_and_no_noise(
    api: Api, namespace: str, kubelet: Kubelet, nodes: Nodes, operator: Callable[..., Operator]
) -> None:
    await nodes.add("n1", 3)
    with running(operator(everywhere=True)) as process:
        await api.create(JOBS, wants(namespace, placement={"topologyLevels": ["example.com/nothing"]}))
        job = await eventually(lambda: api.job(namespace), says("Placed", "False", "UnfitTopologyLevels"))
        assert "no node has the label example.com/nothing" in message(job, "Placed")
        assert await api.pods(namespace) == []
        await eventually(lambda: process.metric("pipelinejob_operator_queue_depth"), lambda depth: depth == 0)


async def test_contradictory_selectors_are_explained(
    api: Api, namespace: str, kubelet: Kubelet, nodes: Nodes, operator: Callable[..., Operator]
) -> None:
    await nodes.add("n1", 3, "a")
    with running(operator(everywhere=True)):
        template = {"nodeSelector": {RACK: "a", "kubernetes.io/hostname": "elsewhere"}}
        await api.create(JOBS, wants(namespace, template=template))
        job = await eventually(lambda: api.job(namespace), says("Placed", "False", "NoPlanFits"))
        assert "not selected by nodeSelector" in message(job, "Placed")
        assert "change the nodes, or the pod's tolerations and selectors" in message(job, "Placed")
        assert await api.pods(namespace) == []


async def test_what_no_empty_node_could_hold_makes_no_pod_and_no_noise_until_a_fitting_node_comes(
    api: Api, namespace: str, kubelet: Kubelet, nodes: Nodes, operator: Callable[..., Operator]
) -> None:
    await nodes.add("small", 1, "a")
    with running(operator(everywhere=True)) as process:
        await api.create(JOBS, wants(namespace, stages=1, gpu={"count": 2}))
        job = await eventually(lambda: api.job(namespace), says("Placed", "False", "NoPlanFits"))
        assert f"0 of 1 stages fit: {GPU} is short by 2" in message(job, "Placed")
        assert "no pod is made before nodes are added or changed" in message(job, "Placed")
        # Others come and go on a node that changes nothing for it: it is not even looked at.
        await api.create(JOBS, wants(namespace, "other", stages=1))
        await eventually(lambda: api.job(namespace, "other"), state("Running"))
        await finish(api, kubelet, namespace, "other")
        await eventually(lambda: api.job(namespace, "other"), state("Succeeded"))
        await eventually(lambda: process.metric("pipelinejob_operator_queue_depth"), lambda depth: depth == 0)
        assert await api.pods(namespace) == []
        assert (await api.job(namespace))["metadata"]["resourceVersion"] == job["metadata"]["resourceVersion"]
        await nodes.add("large", 2, "a")
        await eventually(lambda: api.job(namespace), state("Running"), seconds=15)
        assert pinned(namespace, await api.pods(namespace)) == ["large"]


async def test_an_operator_of_one_namespace_leaves_the_choice_to_kube_scheduler_and_says_so(
    api: Api, namespace: str, kubelet: Kubelet, operator: Callable[..., Operator]
) -> None:
    with running(operator()):
        await api.create(JOBS, job_manifest(namespace))
        job = await eventually(lambda: api.job(namespace), state("Running"))
        assert "the operator is installed for one namespace, so it cannot see the nodes" in message(job, "Placed")


async def test_a_lost_stage_comes_back_near_its_neighbours_and_the_others_stay(
    api: Api, namespace: str, kubelet: Kubelet, nodes: Nodes, operator: Callable[..., Operator]
) -> None:
    for name, gpus, rack in (("b1", 1, "b"), ("a1", 2, "a"), ("a2", 2, "a"), ("a3", 1, "a")):
        await nodes.add(name, gpus, rack)
    with running(operator(everywhere=True)):
        await api.create(JOBS, wants(namespace, recovery={"strategy": "Ladder"}))
        await eventually(lambda: api.job(namespace), state("Running"))
        before = await api.pods(namespace)
        stood = pinned(namespace, before)
        assert all(name.startswith("a") for name in stood)
        await nodes.set(stood[0], "/spec/unschedulable", True)
        await api.delete(PODS, namespace, before[0]["metadata"]["name"], before[0]["metadata"]["uid"])
        after = await eventually(lambda: api.pods(namespace), partial(replaced, before[0]))
        moved, *others = pinned(namespace, after)
        assert others == stood[1:]
        assert moved in {"a1", "a2", "a3"} - {stood[0]}, "the rack of its neighbours"
        assert [pod["metadata"]["uid"] for pod in after[1:]] == [pod["metadata"]["uid"] for pod in before[1:]]


def replaced(old: Manifest, pods: list[Manifest]) -> bool:
    """Whether three pods are open, and one of them takes the place of an old one."""
    uids = {pod["metadata"]["uid"] for pod in pods}
    return (
        len(pods) == 3 and old["metadata"]["uid"] not in uids and all("schedulingGates" not in p["spec"] for p in pods)
    )


async def test_a_node_where_stages_fail_again_and_again_is_taken_only_where_no_other_is_free(
    api: Api, namespace: str, kubelet: Kubelet, nodes: Nodes, operator: Callable[..., Operator]
) -> None:
    for name, gpus in (("a1", 1), ("a2", 2)):
        await nodes.add(name, gpus, "a")
    with running(operator(everywhere=True)):
        await api.create(JOBS, wants(namespace, recovery={"strategy": "Ladder"}))
        await eventually(lambda: api.job(namespace), state("Running"))
        pods = await api.pods(namespace)
        stage = pinned(namespace, pods).index("a1")
        for _ in range(2):
            failing = pods[stage]
            await kubelet.end(failing, 1)
            pods = await eventually(lambda: api.pods(namespace), partial(replaced, failing))
            assert pinned(namespace, pods)[stage] == "a1"
        avoided = (await api.job(namespace))["status"]["avoidedNodes"]
        assert [(short(namespace, item["name"]), item["failures"]) for item in avoided] == [("a1", 2)]
        await nodes.add("a3", 1, "a")
        failing = pods[stage]
        await kubelet.end(failing, 1)
        pods = await eventually(lambda: api.pods(namespace), partial(replaced, failing))
        assert pinned(namespace, pods)[stage] == "a3"


async def test_a_stage_that_joins_a_running_pipeline_goes_beside_the_last_one(
    api: Api, namespace: str, kubelet: Kubelet, nodes: Nodes, operator: Callable[..., Operator]
) -> None:
    for name, gpus, rack in (("b1", 2, "b"), ("c1", 1, "c"), ("c2", 1, "c")):
        await nodes.add(name, gpus, rack)
    with running(operator(everywhere=True)):
        await api.create(JOBS, wants(namespace, recovery={"strategy": "Ladder"}))
        await eventually(lambda: api.job(namespace), state("Running"))
        before = pinned(namespace, await api.pods(namespace))
        await nodes.add("a1", 8, "a")
        await nodes.add("z1", 8, "c" if before[2].startswith("c") else "b")
        await api.set_spec(namespace, stages=4)
        pods = await eventually(
            lambda: api.pods(namespace), lambda pods: len(pods) == 4 and len(pinned(namespace, pods)) == 4
        )
        assert pinned(namespace, pods)[:3] == before
        assert pinned(namespace, pods)[3] in ("z1", "c1", "c2", "b1")
        assert pinned(namespace, pods)[3] != "a1"
