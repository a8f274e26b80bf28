"""A program of the user's own: a trainer from PyPI runs on the environment alone, and its gang restarts as a whole."""

import json

import pytest

from tests.cluster import images, lifecycle
from tests.e2e import kit
from tests.e2e.conftest import ROOT

STEPS = 400


@pytest.fixture(scope="module")
def image() -> str:
    """The image of the example, on every node."""
    directory = str((ROOT / "examples/own-trainer").relative_to(ROOT))
    return images.add(directory, lifecycle.nodes(lifecycle.running().nodes))


def log(namespace: kit.Namespace, pod: str) -> str:
    return kit.kubectl("logs", pod, "-n", namespace.name, check=False)


def test_a_trainer_from_pypi_goes_on_from_its_own_checkpoint_after_a_lost_rank(
    namespace: kit.Namespace, image: str
) -> None:
    namespace.claim("state")
    template = kit.template(image=image, command=["python3", "/opt/trainer/train.py"])
    checkpoint = {"volumeClaimName": "state", "everySteps": 10}
    run = kit.Job(namespace, "own", kit.spec(2, STEPS, checkpoint=checkpoint, template=template)).create()
    run.wait("Running")
    kit.wait_for("rank 0 has saved", lambda: "saved step 10\n" in log(namespace, "own-s0-a0"), 120, run.describe)
    kit.kubectl("delete", "pod", "own-s1-a0", "-n", namespace.name, "--grace-period=0", "--force")
    run.wait_succeeded()

    assert run.status["restarts"] == 1
    assert {pod["metadata"]["name"] for pod in run.pods()} == {"own-s0-a1", "own-s1-a1"}
    for rank in range(2):
        said = log(namespace, f"own-s{rank}-a1")
        assert f"rank {rank} of 2, stage {rank} of 2, goes on from /checkpoint/checkpoint-" in said

    history = json.loads(namespace.read("state", f"checkpoint-{STEPS}/trainer_state.json"))["log_history"]
    told = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    assert [step for step, _ in told] == list(range(1, STEPS + 1)), "no step is skipped, and none is done twice"
    assert told[-1][1] < 0.8 * told[0][1]
