"""What a job has trained is served to 200 clients at once, whatever dies and however many stages there are."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest

from tests.cluster.faults.nodes import dead_node
from tests.e2e import kit
from tests.e2e.conftest import TEXT
from tests.e2e.serving import FRONT, Clients, continued, secured, stages, wait_until_busy

CLIENTS = 200
EACH = 2
"""Requests of each client at a time: so many that the status, which is seconds old, still finds them under way."""
OUTPUT = 96
STEPS = 60
PROMPTS = ["import os", "def ", "class Reader:\n", "for", "    return self.", "from typing import Any, ", "x = [", "#"]
MODEL = {"preset": {"name": "gpt", "layers": 4, "width": 32, "heads": 2, "context": 128}}
APART = {
    "podAntiAffinity": {
        "requiredDuringSchedulingIgnoredDuringExecution": [
            {
                "labelSelector": {"matchExpressions": [{"key": FRONT, "operator": "Exists"}]},
                "topologyKey": "kubernetes.io/hostname",
            }
        ]
    }
}
"""Stages keep away from the nodes of fronts, so that one of theirs can die alone."""

SERVE = {
    "mode": "Serve",
    "stages": 2,
    "model": {"fromJob": {"name": "trained", "step": STEPS}},
    "serve": {
        "deterministic": True,
        "keyValueCacheMiB": 16,
        "bearerTokenSecretName": "token",
        "limits": {"requests": 256, "recoverySeconds": 300},
    },
    "template": {"spec": {"containers": [{"name": "worker"}], "affinity": APART}},
}


@pytest.fixture
def namespace() -> Iterator[kit.Namespace]:
    with secured("serving-chaos") as made:
        made.text("text", TEXT)
        yield made


@pytest.mark.timeout(900)
def test_every_accepted_request_is_answered_whatever_dies(namespace: kit.Namespace) -> None:
    spec = kit.spec(2, STEPS, model=MODEL, checkpoint={"volumeClaimName": "models", "everySteps": STEPS})
    kit.Job(namespace, "trained", spec).create().wait_succeeded()
    answers = continued(namespace, "models", spec["model"], PROMPTS, OUTPUT)
    run = kit.Job(namespace, "served", SERVE).create()
    run.wait("Available")
    fronts = {pod["spec"]["nodeName"] for pod in namespace.list("pods", FRONT)}
    clients = Clients.start(namespace, min(fronts))
    asked: list[dict[str, Any]] = [
        {"prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": OUTPUT, "temperature": 0, "stream": True}
        for number in range(EACH * CLIENTS)
    ]

    def answered_through(fault: Callable[[], Any]) -> None:
        """Have all clients answered, without one lost connection, while a fault strikes."""
        begun = clients.begin("served-front", asked)
        wait_until_busy(run)
        with fault() or nullcontext():
            assert not begun.done(), "requests are in flight"
            assert begun.result() == [{"text": answers[request["prompt"]], "lost": 0} for request in asked]

    def kill_stage() -> None:
        victim = stages(run)[-1]["metadata"]["name"]
        kit.kubectl("delete", "pod", victim, "-n", namespace.name, "--grace-period=0", "--force")

    def kill_operator() -> None:
        where = ("-n", kit.OPERATOR_NAMESPACE, "-l", "app.kubernetes.io/component=operator")
        kit.kubectl("delete", "pods", *where, "--grace-period=0", "--force")

    def serving(count: int) -> None:
        kit.wait_for(f"{count} stages serve", lambda: run.status["readyStages"] == count, 240, run.describe)
        kit.wait_for("no other stage is left", lambda: len(stages(run)) == count, 120, run.describe)

    answered_through(kill_stage)
    answered_through(kill_operator)
    for count in (4, 2):
        answered_through(lambda count=count: run.patch(stages=count))  # type: ignore[misc]
        serving(count)
    home = stages(run)[0]["spec"]["nodeName"]
    assert home not in fronts
    answered_through(lambda: dead_node(home))
    serving(2)
    run.delete()
