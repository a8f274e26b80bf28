"""Stages of a model that is served are replaced one by one, and files of requests are answered, once each."""

import json
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.faults.containers import kill_container, stage_processes
from tests.e2e import kit
from tests.e2e.serving import Clients, make_model

LENGTHS = [3, 17, 40, 64, 90, 121, 5, 33]
OUTPUT = 160
RECORDS = 40


@pytest.fixture(scope="module")
def namespace() -> Iterator[kit.Namespace]:
    with kit.namespace("serving-recovery", {"pod-security.kubernetes.io/enforce": "restricted"}) as made:
        made.claim("models")
        yield made


@pytest.fixture(scope="module")
def answers(namespace: kit.Namespace) -> dict[str, str]:
    """Prompts, and what transformers' ``generate`` answers to them."""
    return make_model(namespace, "models", LENGTHS, OUTPUT)


def spec(mode: str, **engine: Any) -> kit.Object:
    section = {"deterministic": True, "keyValueCacheMiB": 16} | engine
    return {
        "mode": mode,
        "stages": 2,
        "model": {"huggingFace": {"path": "/models/model", "context": 512}},
        mode.lower(): section,
        "recovery": {"strategy": "Ladder"},
        "template": {
            "spec": {
                "containers": [{"name": "worker", "volumeMounts": [{"name": "models", "mountPath": "/models"}]}],
                "volumes": [{"name": "models", "persistentVolumeClaim": {"claimName": "models"}}],
            }
        },
    }


def stage(run: kit.Job, index: int) -> kit.Object:
    pods = run.namespace.list(
        "pods", f"pipelinejob.dev/job={run.name},pipelinejob.dev/stage={index},!pipelinejob.dev/front"
    )
    (found,) = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]
    return found


def running(run: kit.Job) -> int:
    return int(run.status.get("progress", {}).get("running", 0))


def uid(pod: kit.Object) -> str:
    found: str = pod["metadata"]["uid"]
    return found


def kill_worker(run: kit.Job, index: int) -> None:
    worker = stage_processes(uid(stage(run, index))).worker
    assert worker
    worker.end(signal.SIGKILL)


def delete_pod(run: kit.Job, index: int) -> None:
    name = stage(run, index)["metadata"]["name"]
    kit.kubectl("delete", "pod", name, "-n", run.namespace.name, "--grace-period=0", "--force")


def test_a_lost_stage_is_replaced_alone_and_the_answers_stay_the_same(
    namespace: kit.Namespace, answers: dict[str, str]
) -> None:
    clients = Clients.start(namespace)
    run = kit.Job(namespace, "served", spec("Serve", fronts=1)).create()
    run.wait("Available")
    asked = [{"prompt": prompt, "max_tokens": OUTPUT, "temperature": 0, "stream": True} for prompt in list(answers) * 4]
    survivor = uid(stage(run, 0))
    for strike in (
        lambda: kill_worker(run, 1),
        lambda: kill_worker(run, 0),
        lambda: kill_container(uid(stage(run, 1))),
        lambda: delete_pod(run, 1),
    ):
        begun = clients.begin("served-front", asked)
        kit.wait_for("requests are being answered", lambda: running(run) > 0, 60, run.describe)
        strike()
        for request, answer in zip(asked, begun.result(), strict=True):
            assert answer == {"text": answers[request["prompt"]], "lost": 0}  # type: ignore[index]
    assert uid(stage(run, 0)) == survivor
    run.delete()


def test_a_file_is_answered_once_each_through_the_loss_of_both_stages(
    namespace: kit.Namespace, answers: dict[str, str]
) -> None:
    prompts = [list(answers)[number % len(answers)] for number in range(RECORDS)]
    lines = "".join(
        json.dumps({"custom_id": f"{number}", "body": {"prompt": prompt, "max_tokens": OUTPUT, "temperature": 0}})
        + "\n"
        for number, prompt in enumerate(prompts)
    )
    namespace.run("models", "python3", "-c", "import sys; open('/volume/in.jsonl', 'w').write(sys.argv[1])", lines)
    files = {"input": "/models/in.jsonl", "output": "/models/out.jsonl", "maxTokensInFlight": 1024}
    run = kit.Job(namespace, "file", spec("Batch", **files)).create()
    for index, done in ((1, 1), (0, RECORDS // 2)):
        run.wait_step(done)
        delete_pod(run, index)
    run.wait_succeeded()
    found = [json.loads(line) for line in namespace.read("models", "out.jsonl").splitlines()]
    assert [line["custom_id"] for line in found] == [f"{number}" for number in range(RECORDS)]
    assert [line["response"]["body"]["choices"][0]["text"] for line in found] == [answers[prompt] for prompt in prompts]
    assert namespace.run("models", "ls", "/volume").split() == ["in.jsonl", "model", "out.jsonl"]
