"""Gangs of kube-scheduler, for real: of two jobs for more than half of the cluster, one waits and holds nothing."""

from collections.abc import Iterator
from itertools import groupby

import pytest

from tests.cluster import faults
from tests.e2e import kit
from tests.e2e.conftest import install

GROUPS = "podgroups.scheduling.k8s.io"
SLEEP, END = ["sleep", "600"], ["true"]


@pytest.fixture
def gangs() -> Iterator[None]:
    """kube-scheduler's gang API, and an operator that may use it."""
    with faults.gangs():
        install("schedulers={PodGroup}")
        try:
            yield
            # Their namespace is on its way out. Without the API nobody could delete them any more.
            kit.wait_for("no pod group is left", lambda: kit.get(GROUPS, "--all-namespaces")["items"] == [])
        finally:
            install()


def gpus() -> int:
    """How many GPUs the nodes have together."""
    return sum(int(node["status"]["allocatable"].get("nvidia.com/gpu", 0)) for node in kit.get("nodes")["items"])


def job(namespace: kit.Namespace, name: str, command: list[str], stages: int) -> kit.Job:
    spec = kit.spec(stages, placement={"strategy": "Delegated"}, template=kit.template(command=command))
    spec["model"]["preset"]["layers"] = stages
    spec["train"]["microbatches"] = spec["train"]["globalBatchSize"] = stages
    return kit.Job(namespace, name, spec).create()


def scheduled(namespace: kit.Namespace, name: str) -> tuple[str, str]:
    """Status and reason of the condition of a job's PodGroup."""
    group = kit.get(GROUPS, name, "-n", namespace.name)
    found = [(item["status"], item["reason"]) for item in group.get("status", {}).get("conditions", [])]
    return found[0] if found else ("", "")


@pytest.mark.usefixtures("gangs")
def test_of_two_jobs_for_more_than_half_of_the_cluster_one_waits_and_holds_nothing(namespace: kit.Namespace) -> None:
    more_than_half = gpus() // 2 + 1
    first = job(namespace, "first", SLEEP, more_than_half)
    told = first.wait("Placed")["message"]
    assert told.startswith(f"all {more_than_half} stages have a node; ")
    assert told.endswith("kube-scheduler places all or none, as PodGroup first (scheduling.k8s.io/v1beta1)")
    second = job(namespace, "second", END, more_than_half)
    second.wait("Placed", "False", "Unschedulable")
    assert scheduled(namespace, "second") == ("False", "Unschedulable")
    assert [pod["spec"].get("nodeName") for pod in second.pods()] == [None] * more_than_half

    first.delete()
    second.wait_succeeded()


def test_where_the_gang_api_is_not_served_a_job_that_wants_it_says_so(namespace: kit.Namespace) -> None:
    placement = {"strategy": "Delegated", "delegated": {"to": "PodGroup"}}
    run = kit.Job(namespace, "gang", kit.spec(2, placement=placement)).create()
    message = run.wait("Placed", "False", "SchedulerMissing")["message"]
    assert "which the API server does not serve; switch on the feature gate GenericWorkload" in message
    assert run.pods() == []


@pytest.mark.usefixtures("gangs")
def test_a_suspended_gang_gives_its_place_and_takes_it_again_with_its_ranks_in_order(namespace: kit.Namespace) -> None:
    more_than_half = gpus() // 2 + 2
    first = job(namespace, "first", SLEEP, more_than_half)
    first.wait("Placed")
    second = job(namespace, "second", SLEEP, more_than_half)
    second.wait("Placed", "False", "Unschedulable")
    first.patch(suspend=True)
    first.wait("Suspended")
    second.wait("Placed")
    first.patch(suspend=False)
    first.wait("Placed", "False", "Unschedulable")
    second.delete()
    first.wait("Running")
    # While the pods of the other job ended, a host may have had room for less than it has. Now nothing else ends.
    first.patch(suspend=True)
    first.wait("Suspended")
    first.patch(suspend=False)
    first.wait("Running")
    hosts = [pod["spec"]["nodeName"] for pod in first.pods()]
    assert len([host for host, _ in groupby(hosts)]) == len(set(hosts)), "a host has ranks that are no neighbours"
