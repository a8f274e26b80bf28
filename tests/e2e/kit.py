"""What the end-to-end tests say: a namespace, a job, waiting for what they see. Everything goes through kubectl."""

import base64
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

WORKER_IMAGE = os.environ.get("PIPELINEJOB_WORKER_IMAGE", "localhost/pipelinejob/worker:dev")
OPERATOR_NAMESPACE = "pipelinejob-system"
POLL_SECONDS = 0.3
END_OF_LOG = "end-of-log"

Object = dict[str, Any]


ON = 'trap "exit 0" TERM; sleep 600 & wait'
"""A stage that runs until it is told to leave."""


class Timeout(AssertionError):
    """What was waited for did not come."""


def kubectl(*arguments: str, stdin: str | None = None, check: bool = True) -> str:
    """Run kubectl and return what it printed; its error text is the failure's message."""
    done = subprocess.run(["kubectl", *arguments], input=stdin, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise AssertionError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout if done.returncode == 0 else done.stderr


def get(*arguments: str) -> Object:
    """Return an object, or a list of objects, as kubectl reads it."""
    found: Object = json.loads(kubectl("get", *arguments, "-o", "json"))
    return found


def apply(*objects: Object) -> None:
    """Apply manifests, with kubectl's default validation."""
    kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))


def wait_for(what: str, look: Callable[[], Any], seconds: float = 120, dump: Callable[[], str] = str) -> Any:
    """Look until the answer is true and return it; after ``seconds`` fail, showing what ``dump`` returns."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if seen := look():
            return seen
        time.sleep(POLL_SECONDS)
    raise Timeout(f"not within {seconds:.0f} s: {what}\n{dump()}")


@dataclass
class Namespace:
    """A namespace of one test."""

    name: str

    def apply(self, *objects: Object) -> None:
        """Apply manifests into this namespace."""
        apply(*({**o, "metadata": {**o["metadata"], "namespace": self.name}} for o in objects))

    def list(self, kind: str, selector: str = "") -> list[Object]:
        """Return the objects of a kind."""
        items: list[Object] = get(kind, "-n", self.name, "-l", selector)["items"]
        return items

    def claim(self, name: str, mode: str = "ReadWriteMany") -> None:
        """Claim one of the test bed's shared volumes."""
        spec = {
            "accessModes": [mode],
            "storageClassName": os.environ.get("PIPELINEJOB_STORAGE_CLASS", "shared"),
            "resources": {"requests": {"storage": "1Gi"}},
        }
        self.apply({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": spec})

    def text(self, name: str, text: bytes) -> None:
        """Keep a text in a ConfigMap, to be mounted as training data."""
        data = {"text.txt": base64.b64encode(text).decode()}
        self.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "binaryData": data})

    def read(self, claim: str, path: str) -> str:
        """Read a file from a claim."""
        return self.run(claim, "cat", f"/volume/{path}")

    def run(self, claim: str, *command: str, mounts: dict[str, Object] | None = None) -> str:
        """Run a command of the worker image in a pod that mounts a claim at /volume; return what it printed.

        ``mounts``: more volumes, by their path.
        """
        more = {f"more-{number}": item for number, item in enumerate((mounts or {}).items())}
        container = {
            "name": "run",
            "image": WORKER_IMAGE,
            "command": ["sh", "-c", f'"$@"; code=$?; echo {END_OF_LOG}; exit $code', "sh", *command],
            "volumeMounts": [
                {"name": "volume", "mountPath": "/volume"},
                {"name": "scratch", "mountPath": "/tmp"},
                *({"name": name, "mountPath": path} for name, (path, _) in more.items()),
            ],
            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
            "resources": {"requests": {"cpu": "1m"}, "limits": {"cpu": "1"}},
        }
        spec = {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 65532,
                "runAsGroup": 65532,
                "fsGroup": 65532,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container],
            "volumes": [
                {"name": "volume", "persistentVolumeClaim": {"claimName": claim}},
                {"name": "scratch", "emptyDir": {}},
                *({"name": name, **volume} for name, (_, volume) in more.items()),
            ],
        }
        self.apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "runner"}, "spec": spec})
        wait_for(
            "the pod of the command has ended",
            lambda: get("pod", "runner", "-n", self.name)["status"].get("phase") in ("Succeeded", "Failed"),
            dump=lambda: kubectl("describe", "pod", "runner", "-n", self.name),
        )
        # A container counts as ended when its process has; the runtime may still be copying what it printed.
        text: str = wait_for(
            "all that the command printed is in its log",
            lambda: (log := kubectl("logs", "runner", "-n", self.name)).endswith(f"{END_OF_LOG}\n") and log,
        ).removesuffix(f"{END_OF_LOG}\n")
        phase = get("pod", "runner", "-n", self.name)["status"]["phase"]
        kubectl("delete", "pod", "runner", "-n", self.name, "--grace-period=1")
        assert phase == "Succeeded", text
        return text


@contextmanager
def namespace(name: str, labels: dict[str, str] | None = None) -> Iterator[Namespace]:
    """Make a namespace and delete it afterwards."""
    kubectl("delete", "namespace", name, "--ignore-not-found")
    apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels or {}}})
    try:
        account = ("serviceaccount", "default", "-n", name, "--ignore-not-found")
        wait_for(f"namespace {name} has its service account", lambda: kubectl("get", *account), 30)
        yield Namespace(name)
    finally:
        kubectl("delete", "namespace", name, "--wait=false")


@dataclass
class Job:
    """A PipelineJob as its user sees it."""

    namespace: Namespace
    name: str
    spec: Object = field(default_factory=dict)

    def create(self) -> "Job":
        """Apply the job."""
        self.namespace.apply(
            {
                "apiVersion": "pipelinejob.dev/v1alpha1",
                "kind": "PipelineJob",
                "metadata": {"name": self.name},
                "spec": self.spec,
            }
        )
        return self

    def patch(self, **spec: Any) -> None:
        """Change members of the spec."""
        patch = json.dumps({"spec": spec})
        kubectl("patch", "pj", self.name, "-n", self.namespace.name, "--type=merge", "-p", patch)

    def delete(self) -> None:
        """Delete the job and wait until it is gone."""
        kubectl("delete", "pj", self.name, "-n", self.namespace.name)

    @property
    def status(self) -> Object:
        """The status, empty before the operator has written one."""
        status: Object = get("pj", self.name, "-n", self.namespace.name).get("status", {})
        return status

    @property
    def step(self) -> int:
        """Last finished step that the status shows."""
        return int(self.status.get("progress", {}).get("step", 0))

    def pods(self) -> list[Object]:
        """The stage pods, by stage and attempt."""
        pods = self.namespace.list("pods", f"pipelinejob.dev/job={self.name}")
        return sorted(pods, key=lambda pod: pod["metadata"]["name"])

    def identities(self) -> dict[str, tuple[str, int]]:
        """UID and container restarts of each stage pod: they change when a pod is touched."""
        return {
            pod["metadata"]["name"]: (
                pod["metadata"]["uid"],
                sum(container["restartCount"] for container in pod["status"].get("containerStatuses", [])),
            )
            for pod in self.pods()
        }

    def condition(self, kind: str) -> Object:
        """One condition; empty when it is not there."""
        found: Object = next((c for c in self.status.get("conditions", []) if c["type"] == kind), {})
        return found

    def wait(self, kind: str, status: str = "True", reason: str = "", seconds: float = 180) -> Object:
        """Wait for a condition and return it."""

        def look() -> Object | None:
            seen = self.condition(kind)
            met = seen.get("status") == status and seen.get("reason", "").startswith(reason)
            return seen if met else None

        found: Object = wait_for(f"{self.name}: {kind}={status} {reason}", look, seconds, self.describe)
        return found

    def wait_step(self, step: int, seconds: float = 180) -> None:
        """Wait until the status shows a step."""
        wait_for(f"{self.name} is at step {step}", lambda: self.step >= step, seconds, self.describe)

    def wait_succeeded(self, seconds: float = 240) -> None:
        """Wait for success; a job that has failed fails the test at once."""

        def look() -> bool:
            seen = self.condition("Succeeded")
            assert seen.get("status") != "False", f"{self.name} has failed: {seen}\n{self.describe()}"
            return seen.get("status") == "True"

        wait_for(f"{self.name} has succeeded", look, seconds, self.describe)

    def events(self) -> list[str]:
        """Reasons of the job's Events, oldest first."""
        found = self.namespace.list("events")
        mine = [e for e in found if (e.get("involvedObject") or e["regarding"])["name"] == self.name]
        return [e["reason"] for e in sorted(mine, key=lambda e: str(e["metadata"]["creationTimestamp"]))]

    def wait_events(self, *reasons: str) -> None:
        """Wait for Events with these reasons: they follow the status that they tell of."""
        wait_for(f"Events {reasons}", lambda: set(reasons) <= set(self.events()), 30, self.describe)

    def losses(self, claim: str) -> list[float]:
        """The loss of every step, from the history beside the checkpoints."""
        lines = [json.loads(line) for line in self.namespace.read(claim, "history.jsonl").splitlines()]
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        return [line["loss"] for line in lines]

    def describe(self) -> str:
        """All that helps to understand a failed test."""
        where = ("-n", self.namespace.name)
        parts = [
            kubectl("get", "pj,pods", *where, "-o", "wide", check=False),
            kubectl("describe", "pj", self.name, *where, check=False),
            kubectl("logs", "-l", f"pipelinejob.dev/job={self.name}", *where, "--tail=15", "--prefix", check=False),
            kubectl("logs", "-n", OPERATOR_NAMESPACE, "-l", "app.kubernetes.io/component=operator", "--tail=15"),
        ]
        return "\n".join(parts)


def spec(stages: int = 2, steps: int = 40, **members: Any) -> Object:
    """A small job on the text that ``Namespace.text`` keeps; ``members`` replace parts of the spec."""
    return {
        "stages": stages,
        "model": {"preset": {"name": "gpt", "layers": 4, "width": 32, "heads": 2, "context": 32, "dropout": "0.1"}},
        "train": {
            "data": {"files": ["/data/*.txt"]},
            "steps": steps,
            "globalBatchSize": 16,
            "microbatches": 4,
            "optimizer": {"learningRate": "1e-2"},
            "seed": 7,
        },
        "template": template(),
        **members,
    }


def template(image: str = "", env: dict[str, str] | None = None, **worker: Any) -> Object:
    """A pod template that mounts the text; ``worker`` adds members to the worker container."""
    container: Object = {
        "name": "worker",
        "volumeMounts": [{"name": "data", "mountPath": "/data", "readOnly": True}],
        "env": [{"name": name, "value": value} for name, value in (env or {}).items()],
        **({"image": image} if image else {}),
        **worker,
    }
    return {"spec": {"containers": [container], "volumes": [{"name": "data", "configMap": {"name": "text"}}]}}
