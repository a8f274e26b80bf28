"""One stage fails, leaves or is added, and the others keep their processes; the losses are those of one process.

No checkpoint is written, so nothing but the memory of the stages can bring the state back.
"""

import pytest

from tests.cluster import faults
from tests.e2e import kit
from tests.e2e.losses import undisturbed

NEVER = {"volumeClaimName": "state", "everySteps": 1_000_000}
STEPS = 100_000
"""More than a test waits for: it looks at the losses so far."""


def start(namespace: kit.Namespace, stages: int = 4, recovery: kit.Object | None = None, **members: object) -> kit.Job:
    """A job whose group makes steps, with a snapshot of each."""
    namespace.claim("state")
    chosen = {"strategy": "Ladder", "snapshotEverySteps": 1, **(recovery or {})}
    spec = kit.spec(stages, STEPS, checkpoint=NEVER, recovery=chosen, **members)
    run = kit.Job(namespace, "train", spec).create()
    run.wait_step(10)
    run.wait("Protected")
    return run


def keeps_its_losses(run: kit.Job) -> None:
    """The losses so far are those of a run that nothing disturbed."""
    seen = run.step
    run.wait_step(seen + 5)
    losses = run.losses("state")
    assert len(losses) > seen
    assert tuple(losses) == undisturbed(len(losses))


def untouched(before: dict[str, tuple[str, int]], run: kit.Job, *lost: str) -> None:
    """All pods but the lost ones are the same, and no container of them was started again."""
    after = run.identities()
    assert {name: after.get(name) for name in before if name not in lost} == {
        name: identity for name, identity in before.items() if name not in lost
    }


def has(run: kit.Job, *names: str) -> None:
    """Wait until the job's pods are exactly these."""
    kit.wait_for(f"the pods are {names}", lambda: set(run.identities()) == set(names), 90, run.describe)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_pod_that_is_deleted_at_once_is_replaced_alone(namespace: kit.Namespace, stage: int) -> None:
    run = start(namespace)
    before, lost = run.identities(), f"train-s{stage}-a0"
    kit.kubectl("delete", "pod", lost, "-n", namespace.name, "--grace-period=0", "--force")
    run.wait("Running", "False", "Recovering")
    run.wait("Running", seconds=90)
    untouched(before, run, lost)
    has(run, *(set(before) - {lost}), f"{lost}-r1")
    status = run.status
    assert (status["restarts"], status["attempt"], status["firstFailure"]["stage"]) == (1, 0, stage)
    assert [item["restarts"] for item in status["stages"]] == [int(index == stage) for index in range(4)]
    run.wait_events("Recovering")
    keeps_its_losses(run)


def test_a_pod_that_is_deleted_hands_over_and_it_counts_as_no_failure(namespace: kit.Namespace) -> None:
    run = start(namespace)
    before, lost = run.identities(), "train-s1-a0"
    kit.kubectl("delete", "pod", lost, "-n", namespace.name, "--wait=false")
    has(run, *(set(before) - {lost}), f"{lost}-r1")
    run.wait("Running", seconds=90)
    untouched(before, run, lost)
    assert run.status["restarts"] == 0
    keeps_its_losses(run)


def test_a_spare_takes_over_from_a_dead_node(namespace: kit.Namespace) -> None:
    run = start(namespace, stages=3, recovery={"spares": 1})
    kit.wait_for("the spare is ready", lambda: run.status["readySpares"] == 1, 90, run.describe)
    before = run.identities()
    nodes = {stage["pod"]: stage["node"] for stage in run.status["stages"]}
    home = {pod["metadata"]["name"]: pod["spec"]["nodeName"] for pod in run.pods()}
    lost = next(name for name, node in nodes.items() if node != home["train-spare-0-a0"])
    on_it = {name for name, node in nodes.items() if node == nodes[lost]}
    with faults.dead_node(nodes[lost]):
        kit.wait_for(
            "the spare has taken over",
            lambda: "train-spare-0-a0" in [stage["pod"] for stage in run.status["stages"]],
            90,
            run.describe,
        )
        run.wait("Running", seconds=120)
        keeps_its_losses(run)
        untouched(before, run, *on_it)
    assert run.status["restarts"] >= 1


def test_stages_come_and_go_and_the_others_stay(namespace: kit.Namespace) -> None:
    run = start(namespace)
    before = run.identities()
    for stages in (2, 3, 4):
        kit.kubectl("scale", "pj/train", "-n", namespace.name, f"--replicas={stages}")
        kit.wait_for(
            f"{stages} stages run",
            lambda stages=stages: (
                run.status["summary"]["stages"] == f"{stages}/{stages}"
                and run.status["group"]["stages"] == stages
                and run.status["summary"]["state"] == "Running"
            ),
            90,
            run.describe,
        )
        run.wait_step(run.step + 5)
    untouched(before, run, "train-s2-a0", "train-s3-a0")
    status = run.status
    assert (status["restarts"], status["attempt"], status["lastRecovery"].get("repeatedSteps", 0)) == (0, 0, 0)
    keeps_its_losses(run)
