"""The cluster of the end-to-end tests: the one in KUBECONFIG, with the chart under test installed."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import kit

ROOT = Path(__file__).resolve().parents[2]


def install(*values: str) -> None:
    """Install or upgrade the chart and wait until the operator is ready."""
    subprocess.run(
        [
            *("helm", "upgrade", "--install", "pipelinejob", str(ROOT / "charts/pipelinejob")),
            *("--namespace", kit.OPERATOR_NAMESPACE, "--create-namespace", "--wait", "--timeout", "120s"),
            *("--set", "operator.image.repository=localhost/pipelinejob/operator,operator.image.tag=dev"),
            *("--set", f"worker.image.repository={kit.WORKER_IMAGE.rpartition(':')[0]}"),
            *("--set", f"worker.image.tag={kit.WORKER_IMAGE.rpartition(':')[2]}"),
            *(argument for value in values for argument in ("--set", value)),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )


@pytest.fixture(scope="session", autouse=True)
def operator() -> None:
    """Install the chart once."""
    if not os.environ.get("KUBECONFIG"):
        pytest.exit("tests/e2e: KUBECONFIG is not set; run `make test-e2e`, which starts a cluster, or set it", 2)
    install()


@pytest.fixture
def namespace(request: pytest.FixtureRequest) -> Iterator[kit.Namespace]:
    """A namespace named after the test, with the training text in it."""
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower())[:50].strip("-")
    with kit.namespace(name) as made:
        made.text("text", TEXT)
        yield made


TEXT = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("a*.py")))[:100_000]
"""Real text: modules of Python's standard library."""
