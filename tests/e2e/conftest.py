"""The cluster of the end-to-end tests: the one in KUBECONFIG, with the chart under test installed."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import kit

ROOT = Path(__file__).resolve().parents[2]


def install(*values: str, root: Path = ROOT, suffix: str = "") -> None:
    """Install or upgrade the chart of the project in ``root`` and wait until the operator is ready.

    ``suffix``: of the images' names, for programs other than this tree's.
    """
    worker, _, worker_tag = kit.WORKER_IMAGE.rpartition(":")
    images = {
        "operator.image.repository": f"{worker.rpartition('/')[0]}/operator{suffix}",
        "operator.image.tag": worker_tag,
        "worker.image.repository": worker + suffix,
        "worker.image.tag": worker_tag,
    }
    subprocess.run(
        [
            *("helm", "upgrade", "--install", "pipelinejob", str(root / "charts/pipelinejob")),
            *("--namespace", kit.OPERATOR_NAMESPACE, "--create-namespace", "--wait", "--timeout", "120s"),
            *(f"--set={name}={value}" for name, value in images.items()),
            *(f"--set={value}" for value in values),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def install_anew() -> None:
    """Install the chart and start the operator: on a cluster that ran before, the tag may name another image by now."""
    install()
    where = ("-n", kit.OPERATOR_NAMESPACE, "deployment/pipelinejob")
    kit.kubectl("rollout", "restart", *where)
    kit.kubectl("rollout", "status", *where, "--timeout=120s")


@pytest.fixture(scope="session", autouse=True)
def operator() -> None:
    """Install the chart once."""
    if not os.environ.get("KUBECONFIG"):
        pytest.exit("tests/e2e: KUBECONFIG is not set; run `make test-e2e`, which starts a cluster, or set it", 2)
    install_anew()


@pytest.fixture
def namespace(request: pytest.FixtureRequest) -> Iterator[kit.Namespace]:
    """A namespace named after the test, with the training text in it."""
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower())[:50].strip("-")
    with kit.namespace(name) as made:
        made.text("text", TEXT)
        yield made


TEXT = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("a*.py")))[:100_000]
"""Real text: modules of Python's standard library."""
