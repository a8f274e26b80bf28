"""What fails is named, restarts are bounded, and what the cluster refuses becomes a condition with a cure."""

import pytest

from tests.e2e import kit

BREAK_STAGE_1 = """
import os, sys
if os.environ.get("PIPELINE_STAGE") == "1" and "pipelinejob_worker.agent.zygote" in sys.orig_argv:
    def fail():
        os.write(1, b"cannot read the moon\\n")
        os._exit(1)
    os.register_at_fork(after_in_child=fail)
"""


def broken(namespace: kit.Namespace, **members: object) -> kit.Job:
    """A job whose stage 1 starts a worker process that exits 1, for ever."""
    namespace.apply(
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "fault"},
            "data": {"sitecustomize.py": BREAK_STAGE_1},
        }
    )
    template = kit.template(env={"PYTHONPATH": "/fault"})
    template["spec"]["containers"][0]["volumeMounts"].append({"name": "fault", "mountPath": "/fault"})
    template["spec"]["volumes"].append({"name": "fault", "configMap": {"name": "fault"}})
    return kit.Job(namespace, "broken", kit.spec(2, 10, template=template, **members)).create()


def test_a_stage_that_always_fails_ends_the_job_and_is_named(namespace: kit.Namespace) -> None:
    run = broken(namespace, recovery={"maxRestarts": 2})
    failed = run.wait("Succeeded", "False", "RestartBudgetSpent")
    first = run.status["firstFailure"]
    assert first["stage"] == 1
    assert first["exitCode"] == 1
    assert first["node"].startswith("node-")
    assert "cannot read the moon" in first["logTail"]
    for part in ("stage 1", first["node"], "exit code 1", "cannot read the moon"):
        assert part in failed["message"]
    assert run.status["summary"]["state"] == "Failed"
    assert run.status["restarts"] in (1, 2), "what is told of at once is one failure"
    run.wait_events("Recovering", "RestartBudgetSpent")
    kit.wait_for(
        "no stage is left running",
        lambda: all(pod["status"]["phase"] in ("Failed", "Succeeded") for pod in run.pods()),
    )


def test_own_command_runs_in_the_gang_and_fails_by_name(namespace: kit.Namespace) -> None:
    script = 'test "$RANK" = 0 && exit 0; echo "rank $RANK of $WORLD_SIZE at $MASTER_ADDR:$MASTER_PORT"; exit 7'
    template = kit.template(command=["sh", "-c", script])
    run = kit.Job(namespace, "own", kit.spec(2, 10, template=template, recovery={"maxRestarts": 0})).create()
    run.wait("Succeeded", "False", "RestartBudgetSpent")
    first = run.status["firstFailure"]
    assert (first["stage"], first["exitCode"]) == (1, 7)
    assert any("rank 1 of 2 at own-s0-a0.own." in line for line in first["logTail"])


def test_a_deadline_ends_the_job(namespace: kit.Namespace) -> None:
    run = kit.Job(namespace, "late", kit.spec(2, 100_000, activeDeadlineSeconds=5)).create()
    run.wait("Succeeded", "False", "DeadlineExceeded", seconds=60)
    kit.wait_for("its running pods are gone", lambda: not run.pods(), 60, run.describe)


def test_ttl_deletes_a_finished_job(namespace: kit.Namespace) -> None:
    template = kit.template(command=["true"])
    kit.Job(namespace, "short", kit.spec(2, 10, template=template, ttlSecondsAfterFinished=1)).create()
    kit.wait_for("the job is gone", lambda: namespace.list("pj") == [], 60)


def test_a_missing_claim_is_named_and_found_when_it_comes(namespace: kit.Namespace) -> None:
    run = kit.Job(namespace, "claim", kit.spec(2, 5, checkpoint={"volumeClaimName": "state"})).create()
    seen = run.wait("Placed", "False", "VolumeClaimNotFound")
    assert '"state"' in seen["message"]
    assert run.pods() == []
    namespace.claim("state")
    run.wait_succeeded()


def test_a_claim_of_one_node_keeps_the_stages_on_it_or_says_why_not(namespace: kit.Namespace) -> None:
    namespace.claim("state", "ReadWriteOnce")
    gpus = min(int(n["status"]["allocatable"].get("nvidia.com/gpu", "0")) for n in kit.get("nodes")["items"])
    run = kit.Job(namespace, "once", kit.spec(gpus + 1, 5, checkpoint={"volumeClaimName": "state"})).create()
    seen = run.wait("Placed", "False", "NoPlanFits")
    assert "ReadWriteOnce" in seen["message"]
    assert "ReadWriteMany" in seen["message"]
    run.patch(stages=gpus)
    run.wait_succeeded()
    assert len({pod["spec"]["nodeName"] for pod in run.pods()}) == 1


def test_a_quota_that_refuses_half_holds_nothing(namespace: kit.Namespace) -> None:
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "few"}, "spec": {"hard": {"pods": "2"}}}
    namespace.apply(quota)
    run = kit.Job(namespace, "quota", kit.spec(4, 5)).create()
    seen = run.wait("Placed", "False", "QuotaExceeded")
    assert "few" in seen["message"]
    kit.wait_for("the pods that were admitted are released", lambda: run.pods() == [], 60, run.describe)


def test_an_image_that_cannot_be_pulled_is_named(namespace: kit.Namespace) -> None:
    template = kit.template(image="localhost/no/such:image")
    run = kit.Job(namespace, "image", kit.spec(2, 5, template=template)).create()
    seen = run.wait("Running", "False", "ImagePullFailed")
    assert "localhost/no/such:image" in seen["message"]


def test_fewer_layers_than_stages_is_refused_with_the_cure(namespace: kit.Namespace) -> None:
    spec = kit.spec(4, 5)
    spec["model"]["preset"]["layers"] = 1
    run = kit.Job(namespace, "thin", spec).create()
    seen = run.wait("Accepted", "False", "TooFewLayers")
    for part in ("spec.stages", "4", "3"):
        assert part in seen["message"]
    assert run.pods() == []
    assert run.status["summary"]["state"] == "Refused"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stages": 0}, "spec.stages"),
        ({"stages": 10_000}, "spec.stages"),
        ({"stage": 4}, r'unknown field "(spec\.)?stage"'),
    ],
)
def test_bad_input_is_refused_at_apply(namespace: kit.Namespace, change: kit.Object, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        kit.Job(namespace, "bad", {**kit.spec(2, 5), **change}).create()
