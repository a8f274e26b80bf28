"""The kubectl plugin against a real API server, as its user runs it."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelinejob_operator.build.job import Job
from pipelinejob_operator.build.pods import stage_pod
from tests.cluster.control_plane import ControlPlane
from tests.integration.api.jobs import job
from tests.integration.api.kubectl import Kubectl
from tests.unit.operator.builders import INSTALLATION
from tests.unit.plugin.test_draw import node

ROOT = Path(__file__).resolve().parents[3]
LEVELS = "--levels=topology.kubernetes.io/zone,example.com/rack"


@pytest.fixture(scope="module")
def kubectl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubectl]:
    with ControlPlane(tmp_path_factory.mktemp("plane")) as plane:
        kubectl = Kubectl(plane)
        kubectl.said("apply", "--server-side", "-f", str(ROOT / "crds"))
        kubectl.said("wait", "--for=condition=Established", "crd/pipelinejobs.pipelinejob.dev", "--timeout=30s")
        # Nobody takes the taint of a new node away here.
        kubectl.said("create", "-f", "-", stdin=job(spec__template={"spec": {"tolerations": [{"operator": "Exists"}]}}))
        for name, zone, rack in (("a", "z1", "r1"), ("b", "z1", "r1"), ("c", "z1", "r2"), ("d", "z2", "r3")):
            kubectl.said("create", "-f", "-", stdin={"apiVersion": "v1", **node(name, zone, rack)})
        yield kubectl


@pytest.fixture
def drawn(kubectl: Kubectl, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``kubectl pipelinejob draw`` with the plugin on the PATH, as pip puts it there."""
    script = tmp_path / "kubectl-pipelinejob"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m pipelinejob_operator.plugin "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    program, _, kubeconfig = kubectl.command
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}/operator:{ROOT}/worker",
        "KUBECONFIG": kubeconfig,
    }

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [program, "pipelinejob", "draw", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return run


def test_a_job_is_drawn_before_and_after_its_stages_have_nodes(
    kubectl: Kubectl, drawn: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    waiting = drawn("tiny", LEVELS)
    assert waiting.returncode == 1, waiting.stderr
    assert waiting.stdout.startswith("4 of 4 stages have no node\n\nA plan made now:\n")
    assert "a[0] - b[1] -- c[2] --- d[3]" in waiting.stdout

    stored = Job.read(json.loads(kubectl.said("get", "pj/tiny", "-o", "json")))
    for place, name in zip(stored.shape.places(), "dabc", strict=True):
        pod = stage_pod(stored, place, INSTALLATION, share_host=False)
        pod["spec"] = {key: value for key, value in pod["spec"].items() if key != "schedulingGates"} | {
            "nodeName": name
        }
        kubectl.said("create", "-f", "-", stdin=pod)
    placed = drawn("tiny", LEVELS)
    assert placed.returncode == 0, placed.stderr
    assert "d[0] --- a[1] - b[2] -- c[3]" in placed.stdout
    assert placed.stdout.endswith("A plan made now would cost 100010001, no less\n")


def test_a_job_that_is_not_there_is_named(drawn: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = drawn("other", "-n", "default")
    assert done.returncode == 2
    assert done.stderr == 'error: there is no PipelineJob "other" in namespace "default"; see kubectl get pj -A\n'
