"""A job trains, and its losses are those of one process, bit by bit, whatever happens to it."""

from tests.e2e import kit
from tests.e2e.losses import undisturbed

CHECKPOINT = {"volumeClaimName": "state", "everySteps": 10, "keep": 2}


def job(namespace: kit.Namespace, steps: int, stages: int = 2, **members: object) -> kit.Job:
    namespace.claim("state")
    return kit.Job(namespace, "train", kit.spec(stages, steps, checkpoint=CHECKPOINT, **members)).create()


def test_four_stages_have_the_losses_of_one_process(namespace: kit.Namespace) -> None:
    run = job(namespace, steps=150, stages=4)
    run.wait("Accepted")
    run.wait("Placed")
    run.wait("Running")
    assert run.condition("Succeeded")["status"] == "Unknown"
    run.wait_succeeded()

    losses = run.losses("state")
    assert tuple(losses) == undisturbed(150)
    assert losses[-1] < 0.7 * losses[0]

    phases = [pod["status"]["phase"] for pod in run.pods() if not pod["metadata"].get("deletionTimestamp")]
    assert len(phases) == 4, "pods that ended stay, and with them their logs"

    status = run.status
    assert "crossings" in status["summary"], "and which links of the chain cross a domain"
    del status["summary"]["crossings"]
    assert status["summary"] | {"loss": "", "tokensPerSecond": "", "bubble": "", "modelFlops": ""} == {
        "state": "Succeeded",
        "stages": "4/4",
        "step": "150/150",
        "progress": "100%",
        "loss": "",
        "tokensPerSecond": "",
        "bubble": "",
        "bubbleLimit": "43%",
        "requestsPerSecond": "",
        "queue": "",
        "fronts": "",
        "modelFlops": "",
    }
    assert status["progress"]["bubbleLimitPercent"] == 43  # (p-1)/(m+p-1) with p = 4 and m = 4
    assert status["progress"]["lastCheckpointStep"] == 150
    assert status["restarts"] == 0
    assert [stage["index"] for stage in status["stages"]] == [0, 1, 2, 3]
    assert all(stage["node"] and stage["layers"] for stage in status["stages"])
    run.wait_events("Valid", "AllStagesPlaced", "AllStagesReady", "AllStagesSucceeded")


def test_gpipe_has_the_same_losses(namespace: kit.Namespace) -> None:
    namespace.claim("state")
    spec = kit.spec(2, 20, checkpoint=CHECKPOINT)
    spec["train"]["schedule"] = {"name": "GPipe"}
    run = kit.Job(namespace, "gpipe", spec).create()
    run.wait_succeeded()
    assert tuple(run.losses("state")) == undisturbed(20)


def test_a_killed_pod_costs_a_restart_and_no_bit(namespace: kit.Namespace) -> None:
    run = job(namespace, steps=400)
    run.wait_step(30)
    kit.kubectl("delete", "pod", "train-s1-a0", "-n", namespace.name, "--grace-period=0", "--force")
    run.wait_succeeded()
    assert run.status["restarts"] == 1
    assert run.status["firstFailure"]["stage"] == 1
    assert {pod["metadata"]["name"] for pod in run.pods()} == {"train-s0-a0", "train-s1-a0-r1"}
    assert tuple(run.losses("state")) == undisturbed(400)


def test_a_killed_operator_changes_nothing(namespace: kit.Namespace) -> None:
    run = job(namespace, steps=400)
    run.wait_step(20)
    before = run.identities()
    where = ("-n", kit.OPERATOR_NAMESPACE, "-l", "app.kubernetes.io/component=operator")
    kit.kubectl("delete", "pods", *where, "--grace-period=0", "--force")
    run.wait_succeeded()
    assert run.identities() == before
    assert run.status["restarts"] == 0
    assert tuple(run.losses("state")) == undisturbed(400)


def test_suspend_and_resume_on_more_stages_lose_nothing(namespace: kit.Namespace) -> None:
    run = job(namespace, steps=400)
    run.wait_step(15)
    run.patch(suspend=True)
    run.wait("Suspended")
    assert run.pods() == []
    assert run.status["progress"]["lastCheckpointStep"] >= 15, "the stages leave a checkpoint of their last step"

    run.patch(suspend=False, stages=3)
    run.wait_succeeded()
    assert run.status["restarts"] == 0, "a wish of the user is not a failure"
    assert tuple(run.losses("state")) == undisturbed(400)


def test_deletion_leaves_no_object(namespace: kit.Namespace) -> None:
    run = job(namespace, steps=100_000)
    run.wait("Running")
    run.delete()
    for kind in ("pods", "services", "networkpolicies"):
        kit.wait_for(
            f"no {kind} of the job are left",
            lambda kind=kind: not namespace.list(kind, "pipelinejob.dev/job=train"),
            seconds=60,
            dump=lambda kind=kind: kit.kubectl("get", kind, "-n", namespace.name, "-o", "yaml"),
        )
