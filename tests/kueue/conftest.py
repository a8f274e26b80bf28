"""The cluster of the end-to-end tests, with Kueue and one queue."""

from collections.abc import Iterator

import pytest

from tests.cluster import kueue
from tests.e2e import kit
from tests.e2e.conftest import namespace, operator

__all__ = ["kueues", "namespace", "operator", "queue"]

API = "kueue.x-k8s.io/v1beta2"
GPU, HOST = "nvidia.com/gpu", "kubernetes.io/hostname"
QUEUE = "team"
QUOTA = 4
"""GPUs of the queue, half of what the nodes have."""


@pytest.fixture(scope="session")
def kueues(operator: None) -> Iterator[None]:
    """Kueue, which knows the cluster's nodes as a topology."""
    with kueue.running():
        yield


@pytest.fixture
def queue(kueues: None, namespace: kit.Namespace) -> str:
    """A queue of the test's namespace, and the cluster queue of the same name, of which nothing is used."""
    flavor = {"topologyName": QUEUE, "nodeLabels": {"topology.kubernetes.io/region": "region-1"}}
    resources = [{"name": GPU, "nominalQuota": str(QUOTA)}]
    group = {"coveredResources": [GPU], "flavors": [{"name": QUEUE, "resources": resources}]}
    made = (
        _object("Topology", {"levels": [{"nodeLabel": "topology.kubernetes.io/zone"}, {"nodeLabel": HOST}]}),
        _object("ResourceFlavor", flavor),
        _object("ClusterQueue", {"namespaceSelector": {}, "resourceGroups": [group], "stopPolicy": "None"}),
    )
    kit.apply(*made)
    namespace.apply(_object("LocalQueue", {"clusterQueue": QUEUE}))
    kit.wait_for("the queue is active and empty", lambda: active() and used() == 0, 60)
    return QUEUE


def active() -> bool:
    """Whether the queue admits."""
    conditions = kit.get("clusterqueue", QUEUE).get("status", {}).get("conditions", [])
    return any(each["type"] == "Active" and each["status"] == "True" for each in conditions)


def used() -> int:
    """How many GPUs of the queue are given away."""
    flavors = kit.get("clusterqueue", QUEUE).get("status", {}).get("flavorsReservation", [])
    return sum(int(resource["total"]) for flavor in flavors for resource in flavor["resources"])


def _object(kind: str, spec: kit.Object) -> kit.Object:
    return {"apiVersion": API, "kind": kind, "metadata": {"name": QUEUE}, "spec": spec}
