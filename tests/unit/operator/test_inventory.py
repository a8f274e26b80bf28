"""What the cluster has and what is taken stay right whatever comes in whatever order."""

from typing import Any

import pytest

from pipelinejob_operator.placement.topology import read_nodes
from pipelinejob_operator.runtime.inventory import Inventory


def node(name: str = "n1", version: int = 1, uid: str = "", gpus: int = 4, **more: Any) -> dict[str, Any]:
    status = {"allocatable": {"gpu": str(gpus), "pods": "10"}, "conditions": [ready("True")], **more.pop("status", {})}
    meta = {"name": name, "uid": uid or f"uid-{name}", "resourceVersion": str(version), **more.pop("meta", {})}
    return {"metadata": meta, "spec": more, "status": status}


def ready(status: str, heartbeat: str = "12:00") -> dict[str, str]:
    return {"type": "Ready", "status": status, "lastHeartbeatTime": heartbeat}


def pod(uid: str = "p", version: int = 1, on: str = "n1", gpus: int = 1, phase: str = "Running") -> dict[str, Any]:
    container = {"name": "c", "resources": {"requests": {"gpu": str(gpus)}}}
    return {
        "metadata": {"name": uid, "namespace": "team", "uid": uid, "resourceVersion": str(version)},
        "spec": {"nodeName": on, "containers": [container]},
        "status": {"phase": phase},
    }


def stage(uid: str = "s", version: int = 1, on: str = "", gated: bool = True, **meta: Any) -> dict[str, Any]:
    """A stage pod of the job with the UID job."""
    made = pod(uid, version, on)
    made["metadata"] |= {
        "labels": {
            "app.kubernetes.io/managed-by": "pipelinejob-operator",
            "pipelinejob.dev/job": "tiny",
            "pipelinejob.dev/job-uid": "job",
        },
        **meta,
    }
    if gated:
        made["spec"]["schedulingGates"] = [{"name": "pipelinejob.dev/gang"}]
    return made


@pytest.fixture
def inventory() -> Inventory:
    made = Inventory()
    made.put_node(node())
    return made


def free(inventory: Inventory, name: str = "n1") -> dict[str, int]:
    found = inventory.node(name)
    assert found is not None
    assert found in inventory.nodes(), "one and all are read the same"
    return dict(found.free)


class TestSums:
    def test_a_pod_takes_room_until_it_has_ended_or_is_gone(self, inventory: Inventory) -> None:
        assert free(inventory) == {"gpu": 4, "pods": 10}
        inventory.put_pod(pod("a"))
        inventory.put_pod(pod("b", gpus=2))
        assert free(inventory) == {"gpu": 1, "pods": 8}
        inventory.put_pod(pod("a", 2, phase="Succeeded"))
        assert free(inventory) == {"gpu": 2, "pods": 9}
        inventory.drop_pod("b")
        assert free(inventory) == {"gpu": 4, "pods": 10}

    def test_they_are_those_of_a_reading_from_scratch(self, inventory: Inventory) -> None:
        pods = [pod(f"p{number}", on=f"n{number % 3}", gpus=number % 2 + 1) for number in range(30)]
        for item in pods:
            inventory.put_pod(item)
        for name in ("n0", "n2"):
            inventory.put_node(node(name))
        inventory.drop_pod("p7")
        inventory.put_pod(pods[3] | {"status": {"phase": "Failed"}, "metadata": pods[3]["metadata"] | NEWER})
        left = [item for number, item in enumerate(pods) if number not in (3, 7)]
        assert inventory.nodes() == read_nodes([node("n0"), node("n1"), node("n2")], left)

    def test_an_old_message_changes_nothing(self, inventory: Inventory) -> None:
        inventory.put_pod(pod("a", 5, gpus=2))
        inventory.put_pod(pod("a", 4, gpus=1))
        inventory.put_node(node(version=0, gpus=8))
        assert free(inventory)["gpu"] == 2

    def test_what_is_deleted_does_not_come_back(self, inventory: Inventory) -> None:
        inventory.drop_pod("a")
        inventory.put_pod(pod("a", 9))
        inventory.drop_node("n1", "uid-n1")
        inventory.put_node(node(version=9))
        assert inventory.nodes() == ()
        inventory.put_node(node(version=10, uid="another"))
        assert free(inventory)["gpu"] == 4

    def test_pods_may_come_before_their_node(self) -> None:
        made = Inventory()
        made.put_pod(pod("a"))
        made.put_node(node())
        assert free(made)["gpu"] == 3

    def test_a_whole_list_drops_what_it_lacks_but_nothing_that_is_newer(self, inventory: Inventory) -> None:
        for uid, version in (("seen", 3), ("ghost", 4), ("newer", 11)):
            inventory.put_pod(pod(uid, version))
        inventory.put_node(node("n2", version=12))
        assert inventory.keep_pods({"seen"}, 10) == 1
        assert inventory.keep_nodes(set(), 10) == 1
        assert [item.name for item in inventory.nodes()] == ["n2"]
        inventory.put_node(node(version=13, uid="again"))
        assert free(inventory)["gpu"] == 2

    def test_a_node_that_is_not_ready_takes_no_stage(self, inventory: Inventory) -> None:
        inventory.put_node(node(version=2, status={"conditions": [ready("Unknown")]}))
        assert [item.avoided for item in inventory.nodes()] == ["not ready"]

    def test_what_stages_hold_is_known_by_itself(self, inventory: Inventory) -> None:
        inventory.put_pod(pod("other"))
        inventory.put_pod(stage(on="n1", gated=False))
        assert inventory.held() == {"n1": {"gpu": 1, "pods": 1}}
        assert free(inventory)["gpu"] == 2


class TestWaiting:
    def test_gated_stages_are_kept_as_admitted_until_they_are_let_go(self, inventory: Inventory) -> None:
        inventory.put_pod(stage("a"))
        inventory.put_pod(stage("b"))
        assert set(inventory.gated()["job"]) == {"a", "b"}
        assert inventory.gated()["job"]["a"]["spec"]["containers"]
        inventory.put_pod(stage("a", 2, gated=False))
        inventory.put_pod(stage("b", 2, deletionTimestamp="2026-01-01T12:00:00Z"))
        assert inventory.gated() == {}

    def test_a_gated_stage_holds_nothing(self, inventory: Inventory) -> None:
        inventory.put_pod(stage())
        assert free(inventory)["gpu"] == 4


class TestGains:
    """What may give a waiting gang its nodes wakes it; the rest of a cluster's noise does not."""

    @pytest.fixture
    def gains(self, inventory: Inventory) -> Any:
        inventory.put_pod(pod("a"))
        inventory.put_pod(stage())
        calls: list[int] = []
        inventory.more_room = lambda: calls.append(inventory.gains)
        return calls

    def test_a_pod_that_ends_a_node_that_comes_and_a_gang_that_leaves_the_queue(
        self, inventory: Inventory, gains: list[int]
    ) -> None:
        inventory.put_pod(pod("a", 2, phase="Succeeded"))
        assert len(gains) == 1
        inventory.put_node(node("n2"))
        assert len(gains) == 2
        inventory.put_node(node(version=2, unschedulable=True))
        assert len(gains) == 3
        inventory.drop_pod("s")
        assert len(gains) == 4
        assert gains == sorted(set(gains))

    def test_a_heartbeat_a_new_pod_and_a_pods_own_changes_do_not(self, inventory: Inventory, gains: list[int]) -> None:
        inventory.put_node(node(version=2, status={"conditions": [ready("True", "12:05")]}))
        inventory.put_pod(pod("b"))
        inventory.put_pod(pod("b", 2))
        assert gains == []


def test_levels_are_found_when_nodes_get_labels(inventory: Inventory) -> None:
    assert inventory.detected_levels() == ()
    inventory.put_node(node(version=2, meta={"labels": {"topology.kubernetes.io/zone": "a"}}))
    assert inventory.detected_levels() == ("topology.kubernetes.io/zone",)


NEWER = {"resourceVersion": "2"}
