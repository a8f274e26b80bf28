"""Jobs in a queue of Kueue: admitted whole, by quota, in the order of their ranks; taken back and given again."""

from itertools import groupby
from typing import Any

from tests.e2e import kit
from tests.e2e.losses import undisturbed
from tests.kueue.conftest import HOST, QUEUE, used


def job(namespace: kit.Namespace, name: str, stages: int, script: str = kit.ON, **placement: Any) -> kit.Job:
    template = kit.template(command=["sh", "-c", script])
    template["spec"]["terminationGracePeriodSeconds"] = 2
    queued = {"strategy": "Delegated", "delegated": {"to": "Kueue", "queueName": QUEUE}, **placement}
    spec = kit.spec(stages, placement=queued, template=template)
    spec["model"]["preset"]["layers"] = stages
    spec["train"]["microbatches"] = spec["train"]["globalBatchSize"] = stages
    return kit.Job(namespace, name, spec).create()


def nodes(of: kit.Job) -> list[str]:
    """The nodes of the stages, in the order of their ranks; empty for those that have none."""
    return [pod["spec"].get("nodeName", "") for pod in of.pods()]


def test_of_two_jobs_that_exceed_the_quota_together_one_waits_and_holds_nothing(
    namespace: kit.Namespace, queue: str
) -> None:
    first = job(namespace, "first", 3)
    told = first.wait("Placed")["message"]
    assert told.endswith(f"Kueue admits them as one pod group of LocalQueue {queue}")
    assert used() == 3
    second = job(namespace, "second", 3, "true")
    held = second.wait("Placed", "False", "Held")["message"]
    assert "kueue.x-k8s.io/" in held
    assert nodes(second) == ["", "", ""]
    assert used() == 3
    first.delete()
    second.wait_succeeded()
    kit.wait_for("the quota is free again", lambda: used() == 0, 60)


def test_a_job_that_exceeds_the_quota_alone_waits_and_nothing_of_it_runs(namespace: kit.Namespace, queue: str) -> None:
    large = job(namespace, "large", 5)
    large.wait("Placed", "False", "Held")
    small = job(namespace, "small", 2, "true")
    small.wait_succeeded()
    assert nodes(large) == [""] * 5


def test_neighbouring_ranks_share_hosts(namespace: kit.Namespace, queue: str) -> None:
    four = job(namespace, "four", 4, topologyLevels=["topology.kubernetes.io/zone", HOST])
    four.wait("Placed")
    hosts = [(host, len(list(ranks))) for host, ranks in groupby(nodes(four))]
    assert [count for _, count in hosts] == [2, 2]
    assert len({host for host, _ in hosts}) == 2


def test_a_suspended_job_gives_its_quota_back_and_queues_anew(namespace: kit.Namespace, queue: str) -> None:
    first = job(namespace, "first", 3)
    first.wait("Running")
    first.patch(suspend=True)
    first.wait("Suspended")
    kit.wait_for("the quota is free", lambda: used() == 0, 60, first.describe)
    second = job(namespace, "second", 3)
    second.wait("Running")
    first.patch(suspend=False)
    first.wait("Placed", "False", "Held")
    second.delete()
    first.wait("Running")
    assert first.status["restarts"] == 0


def test_a_job_that_kueue_evicts_waits_for_its_turn_and_goes_on_where_it_was(
    namespace: kit.Namespace, queue: str
) -> None:
    namespace.claim("state")
    placement = {"strategy": "Delegated", "delegated": {"to": "Kueue", "queueName": queue}}
    spec = kit.spec(2, 300, placement=placement, checkpoint={"volumeClaimName": "state", "everySteps": 20})
    training = kit.Job(namespace, "training", spec).create()
    training.wait_step(30)
    _stop(queue, "HoldAndDrain")
    training.wait("Placed", "False", "Held")
    kit.wait_for("the quota is free", lambda: used() == 0, 60, training.describe)
    saved = training.step
    assert saved >= 30
    _stop(queue, "None")
    training.wait_succeeded()
    assert training.status["restarts"] == 0
    assert tuple(training.losses("state")) == undisturbed(300)


def _stop(queue: str, policy: str) -> None:
    """Have the queue stop, with or without what it has admitted, or go on."""
    patch = f'{{"spec": {{"stopPolicy": "{policy}"}}}}'
    kit.kubectl("patch", "clusterqueue", queue, "--type=merge", "-p", patch)
