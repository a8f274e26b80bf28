"""An upgrade in mid-job: the operator of this tree takes over stages that the release before it has started."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelinejob_worker.protocol import PROTOCOL_VERSION
from tests.cluster import images, lifecycle
from tests.e2e import kit
from tests.e2e.conftest import ROOT, install
from tests.e2e.losses import undisturbed

PROTOCOL_FILE = "worker/pipelinejob_worker/protocol/environment.py"
SUFFIX = "-before"
PACKAGES = {
    "operator": ("operator/pipelinejob_operator", "worker/pipelinejob_worker"),
    "worker": ("worker/pipelinejob_worker",),
}
PROJECT = "/opt/pipelinejob"


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The tree of the last commit of the protocol version before this one, its programs on every node.

    Its images are those of this tree with the project's own layer replaced: the dependencies are gigabytes that every
    node would have to hold twice.
    """
    raised = git("log", "--format=%H", f"-SPROTOCOL_VERSION = {PROTOCOL_VERSION}\n", "--", PROTOCOL_FILE).split()[-1]
    work = tmp_path_factory.mktemp("before")
    tree = work / "tree"
    git("worktree", "add", "--detach", str(tree), f"{raised}~1")
    try:
        for name, packages in PACKAGES.items():
            images.add(str(_context(work, tree, name, packages)), lifecycle.nodes(lifecycle.running().nodes))
        yield tree
    finally:
        git("worktree", "remove", "--force", str(tree))


def _context(work: Path, tree: Path, name: str, packages: tuple[str, ...]) -> Path:
    """Write what an image is built from: this tree's image of that name, with the packages of ``tree``."""
    repository, _, tag = kit.WORKER_IMAGE.rpartition(":")
    context = work / f"{name}{SUFFIX}"
    context.mkdir()
    lines = [f"FROM {repository.rpartition('/')[0]}/{name}:{tag}", "USER 0", f"RUN rm -rf {PROJECT}/*"]
    for package in packages:
        shutil.copytree(tree / package, context / Path(package).name)
        lines.append(f"COPY {Path(package).name} {PROJECT}/{Path(package).name}")
    lines += [f"RUN python3 -m compileall -q --invalidation-mode unchecked-hash {PROJECT}", "USER 65532:65532"]
    (context / "Containerfile").write_text("\n".join(lines) + "\n")
    return context


def test_the_operator_is_upgraded_while_a_job_runs(namespace: kit.Namespace, before: Path) -> None:
    install(root=before, suffix=SUFFIX)
    try:
        namespace.claim("state")
        spec = kit.spec(2, 600, checkpoint={"volumeClaimName": "state", "everySteps": 100})
        run = kit.Job(namespace, "train", spec).create()
        run.wait_step(10)
        pods = run.identities()
        assert all(SUFFIX in pod["spec"]["containers"][0]["image"] for pod in run.pods())
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
    repository, _, tag = kit.WORKER_IMAGE.rpartition(":")
    template = kit.template(image=f"{repository}{SUFFIX}:{tag}")
    spec = kit.spec(2, 60, checkpoint={"volumeClaimName": "state", "everySteps": 20}, template=template)
    run = kit.Job(namespace, "train", spec).create()
    run.wait_succeeded()
    assert run.status["progress"]["lastCheckpointStep"] == 60
    assert tuple(run.losses("state")) == undisturbed(60)
