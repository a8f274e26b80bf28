"""A real API server with the operator as a real process; the tests play scheduler, kubelet and agent."""

import asyncio
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from kubernetes.aio import client, config

from pipelinejob_operator.build.names import JOB_LABEL, REPLACEMENT_LABEL, SPARE_LABEL
from pipelinejob_operator.placement.pods import node_of
from pipelinejob_operator.policy.facts import StagePod
from pipelinejob_operator.runtime.client import JOBS, PODS, ApiError, Kubernetes, Resource
from tests.cluster.control_plane import free_port

ROOT = Path(__file__).resolve().parents[3]
NAMESPACES = Resource("/api/v1", "namespaces")
PATIENCE_SECONDS = 60.0
POLL_SECONDS = 0.05

Manifest = dict[str, Any]
T = TypeVar("T")


class Api(Kubernetes):
    """The administrator's connection."""

    @classmethod
    async def open(cls, kubeconfig: Path) -> "Api":
        settings = client.Configuration()
        await config.load_kube_config(config_file=str(kubeconfig), client_configuration=settings)  # type: ignore[no-untyped-call]
        return cls(client.ApiClient(settings), lambda: None)

    async def post(self, path: str, body: Manifest) -> Manifest:
        return await self._send("POST", path, body)

    async def items(self, resource: Resource, namespace: str, labels: str = "") -> list[Manifest]:
        return [item async for page, _ in self.pages(resource, namespace, labels) for item in page]

    async def force_delete(self, resource: Resource, namespace: str, name: str) -> None:
        path = f"{resource.prefix}/namespaces/{namespace}/{resource.plural}/{name}"
        with suppress(ApiError):
            await self._send("DELETE", path, {"kind": "DeleteOptions", "gracePeriodSeconds": 0})

    async def job(self, namespace: str, name: str = "tiny") -> Manifest:
        found = await self.get(JOBS, namespace, name)
        assert found is not None, f"there is no job {namespace}/{name}"
        return found

    async def pods(self, namespace: str, job: str = "tiny") -> list[Manifest]:
        pods = await self.items(PODS, namespace, f"{JOB_LABEL}={job}")
        return sorted(pods, key=lambda pod: pod["metadata"]["name"])

    async def set_spec(self, namespace: str, name: str = "tiny", **members: Any) -> None:
        operations = [{"op": "add", "path": f"/spec/{key}", "value": value} for key, value in members.items()]
        await self.json_patch(JOBS, namespace, name, operations)


async def eventually(
    read: Callable[[], Awaitable[T]], wanted: Callable[[T], Any], seconds: float = PATIENCE_SECONDS
) -> T:
    """Read until it is as wanted; fail with what was read last. An API server that is down is read again."""
    last: object = None
    end = asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < end:
        try:
            value = await read()
            if wanted(value):
                return value
            last = value
        except (OSError, TimeoutError, ApiError) as error:
            last = error
        await asyncio.sleep(POLL_SECONDS)
    raise AssertionError(f"not as wanted within {seconds} s; last seen: {last}")


def conditions(job: Manifest) -> dict[str, tuple[str, str]]:
    """Status and reason by condition."""
    return {item["type"]: (item["status"], item["reason"]) for item in job.get("status", {}).get("conditions", [])}


def message(job: Manifest, kind: str) -> str:
    found: str = next(item["message"] for item in job["status"]["conditions"] if item["type"] == kind)
    return found


def state(word: str) -> Callable[[Manifest], bool]:
    """Check that a job is in this state."""
    return lambda job: bool(job.get("status", {}).get("summary", {}).get("state") == word)


def job_manifest(namespace: str, name: str = "tiny", **spec: Any) -> Manifest:
    return {
        "apiVersion": "pipelinejob.dev/v1alpha1",
        "kind": "PipelineJob",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "stages": 3,
            "model": {"preset": {"name": "gpt", "layers": 8, "width": 64, "heads": 4, "context": 32}},
            "train": {"data": {"files": ["/data/*"]}, "steps": 200, "globalBatchSize": 8, "microbatches": 4},
        }
        | spec
        | {"recovery": {"strategy": "RecreateAll"} | spec.get("recovery", {})},
    }


class Operator:
    """An operator process."""

    def __init__(self, kubeconfig: Path, log: Path, **environment: str) -> None:
        self.port = free_port()
        self.log = log
        self._environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{ROOT}/operator:{ROOT}/worker",
            "KUBECONFIG": str(kubeconfig),
            "PIPELINEJOB_WORKER_IMAGE": "worker:test",
            "PIPELINEJOB_HTTP_PORT": str(self.port),
            "PIPELINEJOB_LOG_LEVEL": "DEBUG",
            "POD_NAME": log.stem,
        } | environment
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipelinejob_operator"], env=self._environment, stdout=out, stderr=out
            )

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(how)
        return self.process.wait(30)

    async def fetch(self, path: str) -> str:
        """GET from the operator's own server; raises HTTPError for 503."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

        def get() -> str:
            with opener.open(f"http://127.0.0.1:{self.port}{path}", timeout=5) as response:
                body: bytes = response.read()
                return body.decode()

        return await asyncio.to_thread(get)

    async def ready(self) -> None:
        await eventually(lambda: self.fetch("/readyz"), lambda text: text == "ready")

    async def metric(self, name: str) -> float:
        """Value of one sample of /metrics, 0 where it is not there yet."""
        lines = (await self.fetch("/metrics")).splitlines()
        return next((float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name)), 0.0)


@contextmanager
def running(operator: Operator) -> Iterator[Operator]:
    """Run an operator; its log is shown when a test fails, because pytest prints what the test prints."""
    operator.start()
    try:
        yield operator
    finally:
        if operator.process and operator.process.poll() is None:
            operator.stop()
        print(operator.log.read_text()[-20_000:])


def place_of(pod: Manifest) -> tuple[str, str]:
    """Node and address of a pod: those of its rank; replacements and spares have addresses of their own."""
    labels = pod["metadata"]["labels"]
    if SPARE_LABEL in labels:
        return f"node-spare-{labels[SPARE_LABEL]}", f"127.0.0.{200 + int(labels[SPARE_LABEL])}"
    rank, replacement = StagePod.read(pod).place.rank, int(labels.get(REPLACEMENT_LABEL, "0"))
    return f"node-{rank}", f"127.0.0.{10 + rank + 20 * replacement}"


class Kubelet:
    """Scheduler and kubelet of a namespace: binds open pods where they are pinned, runs them, buries deleted ones."""

    def __init__(self, api: Api, namespace: str) -> None:
        self._api, self._namespace = api, namespace
        self.binds = True
        self.starts = True
        self.buries = True

    async def run(self) -> None:
        while True:
            with suppress(ApiError, OSError, TimeoutError):
                for pod in await self._api.items(PODS, self._namespace):
                    await self._serve(pod)
            await asyncio.sleep(POLL_SECONDS)

    async def _serve(self, pod: Manifest) -> None:
        name, spec, status = pod["metadata"]["name"], pod["spec"], pod.get("status", {})
        home, address = place_of(pod)
        if "deletionTimestamp" in pod["metadata"]:
            if self.buries:
                await self._api.force_delete(PODS, self._namespace, name)
        elif not spec.get("nodeName"):
            if self.binds and not spec.get("schedulingGates"):
                binding = {
                    "apiVersion": "v1",
                    "kind": "Binding",
                    "metadata": {"name": name},
                    "target": {"apiVersion": "v1", "kind": "Node", "name": node_of(pod) or home},
                }
                await self._api.post(f"/api/v1/namespaces/{self._namespace}/pods/{name}/binding", binding)
        elif status.get("phase") == "Pending" and self.starts:
            await self.report(
                pod,
                phase="Running",
                ready=True,
                state={"running": {"startedAt": _now()}},
                address=address,
            )

    async def end(self, pod: Manifest, exit_code: int, text: str = "", reason: str = "") -> None:
        """Let the worker container of a pod end."""
        reason = reason or ("Completed" if exit_code == 0 else "Error")
        terminated = {"exitCode": exit_code, "reason": reason, "message": text, "finishedAt": _now()}
        await self.report(
            pod,
            phase="Failed" if exit_code else "Succeeded",
            ready=False,
            state={"terminated": terminated},
            address=pod["status"].get("podIP", ""),
        )

    async def report(self, pod: Manifest, *, phase: str, ready: bool, state: Manifest, address: str = "") -> None:
        """Write a pod's status as a kubelet does."""
        flag = "True" if ready else "False"
        status = {
            "phase": phase,
            "conditions": [
                {"type": "PodScheduled", "status": "True", "lastTransitionTime": _now()},
                {"type": "Ready", "status": flag, "lastTransitionTime": _now()},
            ],
            "containerStatuses": [
                {
                    "name": "worker",
                    "ready": ready,
                    "restartCount": 0,
                    "image": "worker:test",
                    "imageID": "",
                    "state": state,
                }
            ],
        }
        if address:
            status |= {"podIP": address, "podIPs": [{"ip": address}]}
        name = pod["metadata"]["name"]
        operations = [{"op": "add", "path": "/status", "value": status}]
        await self._api.json_patch(PODS, self._namespace, name, operations, "status")


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
