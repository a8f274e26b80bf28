"""The benchmark's column of kube-scheduler is the real scheduler's choice on the same nodes."""

from typing import Any

from tools.bench.kube_scheduler import place
from tools.bench.placement import GPU, LEVELS, STAGE_POD, Case, by_kube_scheduler, cost, manifests

LABELS = [level.label for level in LEVELS]


def node(name: str, rack: str, gpus: int) -> dict[str, Any]:
    labels = {**dict(zip(LABELS, ("z", "b", rack), strict=False)), "kubernetes.io/hostname": name}
    room = {"cpu": "96", "memory": "1Ti", GPU: str(gpus), "pods": "110"}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "namespace": "", "labels": labels},
        "status": {"allocatable": room},
    }


def test_neighbours_share_the_host_that_has_room_for_both_and_other_pods_take_theirs() -> None:
    asked = {"cpu": "1", GPU: "1"}
    other = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "other", "namespace": "default"},
        "spec": {
            "nodeName": "a",
            "containers": [{"name": "x", "image": "x", "resources": {"requests": asked, "limits": asked}}],
        },
    }
    nodes = [node("a", "r1", 2), node("b", "r2", 2)]
    assert place(nodes, [other], STAGE_POD, (2, 1), LABELS) == ["b", "b"]


def test_a_case_of_the_benchmark_gives_a_place_to_every_stage() -> None:
    case = Case(6, 32, pipelines=2)
    found = by_kube_scheduler(case)
    assert len(found) == 12
    assert set(found) <= {item["metadata"]["name"] for item in manifests(case)[0]}
    assert cost(case, found) > 0
