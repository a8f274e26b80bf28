"""A model is served to 200 clients at once while a stage and the operator die."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e import kit
from tests.e2e.serving import TOKEN, Clients, make_model

CLIENTS = 200
OUTPUT = 48
FRONT = "pipelinejob.dev/front"
SPEC = {
    "mode": "Serve",
    "stages": 2,
    "model": {"huggingFace": {"path": "/models/model", "context": 512}},
    "serve": {
        "deterministic": True,
        "keyValueCacheMiB": 16,
        "bearerTokenSecretName": "token",
        "limits": {"requests": 256, "recoverySeconds": 300},
    },
    "template": {
        "spec": {
            "containers": [{"name": "worker", "volumeMounts": [{"name": "models", "mountPath": "/models"}]}],
            "volumes": [{"name": "models", "persistentVolumeClaim": {"claimName": "models"}}],
        }
    },
}


@pytest.fixture
def namespace() -> Iterator[kit.Namespace]:
    with kit.namespace("serving-chaos", {"pod-security.kubernetes.io/enforce": "restricted"}) as made:
        made.claim("models")
        made.apply(
            {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "token"}, "stringData": {"token": TOKEN}}
        )
        yield made


@pytest.mark.timeout(600)
def test_every_accepted_request_is_answered_whatever_dies(namespace: kit.Namespace) -> None:
    answers = make_model(namespace, "models", [3, 17, 40, 64, 90, 121, 5, 33], OUTPUT)
    clients = Clients.start(namespace)
    run = kit.Job(namespace, "served", SPEC).create()
    run.wait("Available")
    prompts = [list(answers)[number % len(answers)] for number in range(CLIENTS)]
    asked: list[dict[str, Any]] = [
        {"prompt": prompt, "max_tokens": OUTPUT, "temperature": 0, "stream": True} for prompt in prompts
    ]
    expected = [{"text": answers[prompt], "lost": 0} for prompt in prompts]

    def stages() -> list[kit.Object]:
        return namespace.list("pods", f"pipelinejob.dev/job={run.name},!{FRONT}")

    def begin() -> Any:
        begun = clients.begin("served-front", asked)
        running = lambda: run.status.get("progress", {}).get("running", 0) > 0  # noqa: E731
        kit.wait_for("requests are being answered", running, 60, run.describe)
        return begun

    begun = begin()
    victim = stages()[-1]["metadata"]["name"]
    kit.kubectl("delete", "pod", victim, "-n", namespace.name, "--grace-period=0", "--force")
    assert begun.result() == expected

    begun = begin()
    where = ("-n", kit.OPERATOR_NAMESPACE, "-l", "app.kubernetes.io/component=operator")
    kit.kubectl("delete", "pods", *where, "--grace-period=0", "--force")
    assert begun.result() == expected
    run.delete()
