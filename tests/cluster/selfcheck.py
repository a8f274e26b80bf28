"""The test bed's own test: a start that is killed half-way, then a whole life with a pod, leave nothing behind."""

import signal
import subprocess
import sys

from tests.cluster import commands, leftovers, lifecycle, processes, progress, settings
from tests.cluster.api import JSON, Api
from tests.cluster.errors import ClusterError
from tests.cluster.node import PAUSE_IMAGE

NODES = 2
GPUS = 1
POD_PATH = "/api/v1/namespaces/default/pods"
POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "selfcheck"},
    "spec": {
        "containers": [
            {
                "name": "pause",
                "image": PAUSE_IMAGE,
                "imagePullPolicy": "Never",
                "resources": {"limits": {"nvidia.com/gpu": str(GPUS)}},
                "volumeMounts": [{"name": "memory", "mountPath": "/memory"}],
            }
        ],
        "volumes": [{"name": "memory", "emptyDir": {"medium": "Memory"}}],
    },
}


def _compare(before: leftovers.Picture, what: str) -> None:
    found = leftovers.differences(before, leftovers.take())
    if found:
        raise ClusterError("\n  ".join([f"after {what} the machine is not as before:", *found]))
    progress.say(f"after {what}: nothing is left behind")


def _killed_start() -> None:
    argv = [sys.executable, "-m", "tests.cluster", "up", f"--nodes={NODES}", f"--gpus-per-node={GPUS}"]
    with subprocess.Popen(argv, cwd=settings.REPOSITORY, stdout=subprocess.DEVNULL) as start:
        commands.wait_until(
            "a container runtime runs",
            lambda: start.poll() is not None or bool(processes.pid_of(settings.STATE, "containerd-node-1")),
            seconds=3600,
        )
        start.send_signal(signal.SIGKILL)
    if start.returncode != -signal.SIGKILL:
        raise ClusterError(f"the start ended by itself with status {start.returncode}, before a node ran")


def _run_pod() -> None:
    api = Api()
    commands.wait_until(
        "the default service account exists",
        lambda: any(
            item["metadata"]["name"] == "default"
            for item in api.request("GET", "/api/v1/namespaces/default/serviceaccounts")["items"]
        ),
    )
    api.request("POST", POD_PATH, POD, JSON)
    commands.wait_until(
        "the pod runs",
        lambda: api.request("GET", f"{POD_PATH}/selfcheck")["status"].get("phase") == "Running",
    )


def run() -> None:
    """Run the check.

    Raises:
        ClusterError: a cluster runs already, or something was left behind; the message lists it.

    """
    if settings.STATE.exists():
        raise ClusterError("a cluster runs on this machine, or one was interrupted; `make cluster-down` first")
    lifecycle.prepare()
    before = leftovers.take()
    try:
        _killed_start()
        lifecycle.down()
        _compare(before, "a start that was killed")
        lifecycle.up(NODES, GPUS, 0)
        _run_pod()
    finally:
        lifecycle.down()
    _compare(before, "a cluster with a running pod")
    lifecycle.down()
    _compare(before, "a second down")
