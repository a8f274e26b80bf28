"""One control plane for all tests here, and for each test a namespace of its own with a kubelet."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from tests.cluster.control_plane import ControlPlane
from tests.integration.operator.harness import NAMESPACES, ROOT, Api, Kubelet, Operator, eventually
from tests.integration.operator.rights import bindings

CRD = ROOT / "crds" / "pipelinejob.dev_pipelinejobs.yaml"
OPERATOR_USER = "pipelinejob-operator"

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """etcd and an API server that knows PipelineJobs."""
    with ControlPlane(tmp_path_factory.mktemp("plane")) as made:
        asyncio.run(_install(made))
        yield made


async def _install(plane: ControlPlane) -> None:
    api = await Api.open(plane.kubeconfig)
    try:
        crds = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
        await api.post(crds, yaml.safe_load(CRD.read_text()))
        for path, manifest in bindings(OPERATOR_USER):
            await api.post(path, manifest)
        jobs = "/apis/pipelinejob.dev/v1alpha1/pipelinejobs"
        await eventually(lambda: api._send("GET", jobs), lambda page: page["items"] == [])
    finally:
        await api.close()


@pytest.fixture(scope="session")
def operator_kubeconfig(plane: ControlPlane) -> Path:
    """Kubeconfig of a user that has the operator's rights and no others."""
    return plane.authority.kubeconfig(plane.home / "operator.kubeconfig", plane.server, OPERATOR_USER)


@pytest.fixture
async def api(plane: ControlPlane) -> AsyncIterator[Api]:
    opened = await Api.open(plane.kubeconfig)
    yield opened
    await opened.close()


@pytest.fixture
async def namespace(api: Api) -> str:
    name = f"test-{next(_numbers)}"
    await api.post("/api/v1/namespaces", {"metadata": {"name": name}})
    await eventually(lambda: api.get(NAMESPACES, "", name), bool)
    return name


@pytest.fixture
async def kubelet(api: Api, namespace: str) -> AsyncIterator[Kubelet]:
    made = Kubelet(api, namespace)
    task = asyncio.create_task(made.run())
    yield made
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


@pytest.fixture
def operator(operator_kubeconfig: Path, namespace: str, tmp_path: Path) -> Callable[..., Operator]:
    """Make operators that watch the test's namespace."""

    def make(name: str = "operator-1", **environment: str) -> Operator:
        scope = {"PIPELINEJOB_WATCH_NAMESPACE": namespace, "POD_NAMESPACE": namespace}
        return Operator(operator_kubeconfig, tmp_path / f"{name}.log", **(scope | environment))

    return make
