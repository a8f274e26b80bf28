"""An upgrade in mid-job: the operator of this tree takes over stages that the release before it has started."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelinejob_worker.protocol import PROTOCOL_VERSION
from tests.e2e import kit
from tests.e2e.conftest import ROOT, install
from tests.e2e.losses import undisturbed

PROTOCOL_FILE = "worker/pipelinejob_worker/protocol/environment.py"
TAG = "before"


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The tree of the last commit of the protocol version before this one, its images on every node."""
    raised = git("log", "--format=%H", f"-SPROTOCOL_VERSION = {PROTOCOL_VERSION}\n", "--", PROTOCOL_FILE).split()[-1]
    tree = tmp_path_factory.mktemp("before") / "tree"
    git("worktree", "add", "--detach", str(tree), f"{raised}~1")
    try:
        environment = os.environ | {"IMAGE_TAG": TAG, "PYTHONPATH": str(tree)}
        subprocess.run([sys.executable, "-m", "tests.cluster", "load"], cwd=tree, env=environment, check=True)
        yield tree
    finally:
        git("worktree", "remove", "--force", str(tree))


def test_the_operator_is_upgraded_while_a_job_runs(namespace: kit.Namespace, before: Path) -> None:
    install(root=before, tag=TAG)
    try:
        namespace.claim("state")
        spec = kit.spec(2, 600, checkpoint={"volumeClaimName": "state", "everySteps": 100})
        run = kit.Job(namespace, "train", spec).create()
        run.wait_step(10)
        pods = run.identities()
        assert all(pod["spec"]["containers"][0]["image"].endswith(f":{TAG}") for pod in run.pods())
    finally:
        install()
    seen = run.step
    run.wait_step(seen + 20)
    assert run.identities() == pods, "the new operator reads the old agents' status and touches no pod"
    run.wait_succeeded()
    assert run.identities() == pods
    assert run.status["restarts"] == 0
    assert run.status["progress"]["step"] == 600
    assert tuple(run.losses("state")) == undisturbed(600)


def test_the_operator_speaks_with_workers_of_the_release_before(namespace: kit.Namespace, before: Path) -> None:
    namespace.claim("state")
    template = kit.template(image=f"{kit.WORKER_IMAGE.rpartition(':')[0]}:{TAG}")
    spec = kit.spec(2, 60, checkpoint={"volumeClaimName": "state", "everySteps": 20}, template=template)
    run = kit.Job(namespace, "train", spec).create()
    run.wait_succeeded()
    assert run.status["progress"]["lastCheckpointStep"] == 60
    assert tuple(run.losses("state")) == undisturbed(60)
