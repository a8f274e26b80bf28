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
from tests.integration.operator.rights import CLUSTER_WIDE, NAMESPACED, bindings

CRD = ROOT / "crds" / "pipelinejob.dev_pipelinejobs.yaml"
USERS = {"operator-of-one-namespace": NAMESPACED, "operator-of-all": CLUSTER_WIDE}

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """etcd and an API server that knows PipelineJobs."""
    with ControlPlane(tmp_path_factory.mktemp("plane")) as made:
        asyncio.run(install(made))
        yield made


async def install(plane: ControlPlane) -> None:
    """Make PipelineJobs known, and the users that operators are."""
    api = await Api.open(plane.kubeconfig)
    try:
        crds = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
        await api.post(crds, yaml.safe_load(CRD.read_text()))
        for user, rules in USERS.items():
            for path, manifest in bindings(user, rules):
                await api.post(path, manifest)
        jobs = "/apis/pipelinejob.dev/v1alpha1/pipelinejobs"
        await eventually(lambda: api._send("GET", jobs), lambda page: page["items"] == [])
    finally:
        await api.close()


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
def operator(plane: ControlPlane, namespace: str, tmp_path: Path) -> Callable[..., Operator]:
    """Make operators that watch the test's namespace, or all; each has the rights that it needs and no others."""

    def make(name: str = "operator-1", *, everywhere: bool = False, **environment: str) -> Operator:
        user = "operator-of-all" if everywhere else "operator-of-one-namespace"
        kubeconfig = plane.authority.kubeconfig(tmp_path / f"{name}.kubeconfig", plane.server, user)
        scope = {"PIPELINEJOB_WATCH_NAMESPACE": "" if everywhere else namespace, "POD_NAMESPACE": namespace}
        return Operator(kubeconfig, tmp_path / f"{name}.log", **(scope | environment))

    return make
