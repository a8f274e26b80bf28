"""A model is served: what clients get, whatever happens to fronts, stages and the operator in the meantime."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e import kit
from tests.e2e.conftest import TEXT
from tests.e2e.serving import FRONT, Clients, continued, make_model, secured, stages, two_stages, wait_until_busy

LENGTHS = [3, 17, 40, 64, 90, 121, 5, 33]
OUTPUT = 160
MANY = 120
"""Requests that take long enough for the job's status, which looks every three seconds, to show them running."""


@pytest.fixture(scope="module")
def namespace() -> Iterator[kit.Namespace]:
    with secured("serving") as made:
        yield made


@pytest.fixture(scope="module")
def answers(namespace: kit.Namespace) -> dict[str, str]:
    """Prompts, and what transformers' ``generate`` answers to them."""
    return make_model(namespace, "models", LENGTHS, OUTPUT)


@pytest.fixture(scope="module")
def clients(namespace: kit.Namespace) -> Clients:
    return Clients.start(namespace)


@pytest.fixture(scope="module")
def served(namespace: kit.Namespace, answers: dict[str, str]) -> kit.Job:
    run = kit.Job(namespace, "served", two_stages(requests=64, recoverySeconds=300)).create()
    run.wait("Available")
    return run


def requests(answers: dict[str, str], count: int = 0, **others: Any) -> list[dict[str, Any]]:
    """Greedy completions of the prompts, each in turn until there are ``count``."""
    prompts = list(answers)
    return [
        {"prompt": prompts[number % len(prompts)], "max_tokens": OUTPUT, "temperature": 0, **others}
        for number in range(count or len(prompts))
    ]


def check(asked: list[dict[str, Any]], got: list[dict[str, Any]], answers: dict[str, str]) -> None:
    """Every answer is the one of ``generate``."""
    for request, answer in zip(asked, got, strict=True):
        assert answer.get("text") == answers[request["prompt"]], answer


def fronts(namespace: kit.Namespace) -> list[kit.Object]:
    pods = namespace.list("pods", FRONT)
    return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_greedy_answers_are_those_of_transformers(
    served: kit.Job, clients: Clients, answers: dict[str, str], stream: bool
) -> None:
    asked = requests(answers, stream=stream)
    check(asked, clients.ask("served-front", asked), answers)


def test_who_has_no_token_is_refused(served: kit.Job, clients: Clients, answers: dict[str, str]) -> None:
    (got,) = clients.ask("served-front", requests(answers, 1), key="wrong", retries=0)
    assert (got["status"], got["code"]) == (401, "invalid_api_key")


def test_what_it_does_is_shown(served: kit.Job, clients: Clients, answers: dict[str, str]) -> None:
    asked = requests(answers, MANY, stream=True)
    begun = clients.begin("served-front", asked)
    wait_until_busy(served)
    header, row = kit.kubectl("get", "pj", "served", "-n", served.namespace.name).splitlines()
    assert "REQUESTS/S" in header and "QUEUE" in header
    shown = served.status["summary"]
    assert (shown["state"], shown["stages"], shown["fronts"]) == ("Running", "2/2", "2/2"), row
    check(asked, begun.result(), answers)
    kit.wait_for("the rate is shown", lambda: float(served.status["summary"]["requestsPerSecond"]) > 0, 30)


def test_overload_is_refused_with_a_time_to_come_back_and_harms_nobody(
    served: kit.Job, clients: Clients, answers: dict[str, str]
) -> None:
    asked = requests(answers, 200)
    got = clients.ask("served-front", asked, retries=0)
    refused = [answer for answer in got if "status" in answer]
    assert refused, "two fronts take 64 requests each"
    assert {answer["status"] for answer in refused} == {429}
    assert all(int(answer["retryAfter"]) > 0 for answer in refused)
    taken = [(request, answer) for request, answer in zip(asked, got, strict=True) if "text" in answer]
    check([request for request, _ in taken], [answer for _, answer in taken], answers)
    assert {pod["status"]["containerStatuses"][0]["restartCount"] for pod in fronts(served.namespace)} == {0}


def test_a_killed_front_breaks_its_own_connections_only(
    served: kit.Job, clients: Clients, answers: dict[str, str]
) -> None:
    asked = requests(answers, MANY, stream=True)
    begun = clients.begin("served-front", asked, tries=5)
    wait_until_busy(served)
    victim = fronts(served.namespace)[0]["metadata"]["name"]
    kit.kubectl("delete", "pod", victim, "-n", served.namespace.name, "--grace-period=0", "--force")
    got = begun.result()
    check(asked, got, answers)
    assert any(not answer["lost"] for answer in got), "the other front's connections stay"
    served.wait("Available")
    kit.wait_for("there are two fronts again", lambda: served.status["readyFronts"] == 2, 60, served.describe)


@pytest.mark.timeout(600)
def test_a_killed_stage_is_a_pause_and_the_answers_stay_the_same(
    served: kit.Job, clients: Clients, answers: dict[str, str]
) -> None:
    asked = requests(answers, MANY, stream=True)
    begun = clients.begin("served-front", asked)
    wait_until_busy(served)
    before = {pod["metadata"]["uid"] for pod in fronts(served.namespace)}
    victim = next(pod for pod in stages(served) if pod["metadata"]["labels"]["pipelinejob.dev/stage"] == "1")
    kit.kubectl("delete", "pod", victim["metadata"]["name"], "-n", served.namespace.name, "--grace-period=0", "--force")
    got = begun.result()
    check(asked, got, answers)
    assert {answer["lost"] for answer in got} == {0}, "no connection broke"
    assert {pod["metadata"]["uid"] for pod in fronts(served.namespace)} == before
    assert served.status["restarts"] == 1


@pytest.mark.timeout(900)
def test_stages_are_added_and_taken_while_clients_are_answered(
    served: kit.Job, clients: Clients, answers: dict[str, str]
) -> None:
    asked = requests(answers, MANY, stream=True)
    for count in (4, 2):
        begun = clients.begin("served-front", asked)
        wait_until_busy(served)
        served.patch(stages=count)
        kit.wait_for(
            f"{count} stages serve", lambda count=count: served.status["readyStages"] == count, 240, served.describe
        )
        got = begun.result()
        check(asked, got, answers)
        assert {answer["lost"] for answer in got} == {0}
        kit.wait_for("no other stage is left", lambda count=count: len(stages(served)) == count, 60, served.describe)


def test_suspended_it_has_no_pods_and_resumed_it_answers(
    served: kit.Job, clients: Clients, answers: dict[str, str]
) -> None:
    served.patch(suspend=True)
    served.wait("Suspended")
    kit.wait_for("no pod is left", lambda: served.pods() == [], 60, served.describe)
    assert served.condition("Available")["status"] == "False"
    served.patch(suspend=False)
    served.wait("Available")
    asked = requests(answers)
    check(asked, clients.ask("served-front", asked), answers)


@pytest.mark.timeout(900)
def test_another_job_takes_its_place_with_another_model_and_no_client_notices(
    served: kit.Job, clients: Clients, answers: dict[str, str]
) -> None:
    namespace, shared = served.namespace, {"sharedService": "chat", "modelName": "chat"}
    others = make_model(namespace, "models", LENGTHS, OUTPUT, seed=2, directory="other")
    assert not set(others.values()) & set(answers.values())
    served.patch(serve=shared)
    kit.kubectl("rollout", "status", "deployment/served-front", "-n", namespace.name, "--timeout=120s")

    def behind(job: str) -> bool:
        """Whether fronts of a job are among those that the Service sends clients to."""
        slices = namespace.list("endpointslices", "kubernetes.io/service-name=chat")
        ready = [end for part in slices for end in part["endpoints"] or () if end["conditions"]["ready"]]
        return any(end["targetRef"]["name"].startswith(f"{job}-front-") for end in ready)

    kit.wait_for("the shared Service has fronts", lambda: behind("served"), 60, served.describe)
    spec = two_stages("other", requests=64, recoverySeconds=300)
    following = kit.Job(namespace, "following", spec | {"serve": spec["serve"] | shared}).create()
    following.wait("Available")
    kit.wait_for("both have fronts behind it", lambda: behind("following"), 60, following.describe)
    asked = requests(answers, MANY, stream=True, model="chat")
    begun = clients.begin("chat", asked)
    wait_until_busy(served)
    served.patch(suspend=True)
    served.wait("Suspended", seconds=300)
    got = begun.result()
    assert {answer["lost"] for answer in got} == {0}
    texts = [answer["text"] for answer in got]
    by_old = [text == answers[request["prompt"]] for request, text in zip(asked, texts, strict=True)]
    by_new = [text == others[request["prompt"]] for request, text in zip(asked, texts, strict=True)]
    assert all(old != new for old, new in zip(by_old, by_new, strict=True)), "each answer is of one of the models"
    assert any(by_old)
    check(asked, clients.ask("chat", asked), others)

    served.patch(suspend=False)
    served.wait("Available")
    kit.wait_for("the first is back", lambda: behind("served"), 60, served.describe)
    following.delete()
    kit.wait_for("the second has gone", lambda: not behind("following"), 60, served.describe)
    check(asked, clients.ask("chat", asked), answers)


@pytest.mark.timeout(600)
def test_what_a_job_has_trained_is_served_as_soon_as_it_is_saved(namespace: kit.Namespace, clients: Clients) -> None:
    namespace.text("text", TEXT)
    namespace.claim("weights")
    model = {"fromJob": {"name": "trained", "step": 30}}
    run = kit.Job(namespace, "told", {"mode": "Serve", "stages": 2, "model": model, "serve": {"fronts": 1}}).create()
    run.wait("Placed", "False", "ModelJobNotFound")

    spec = kit.spec(3, 30, checkpoint={"volumeClaimName": "weights", "everySteps": 10})
    kit.Job(namespace, "trained", spec).create().wait_succeeded()
    run.wait("Available")
    expected = continued(namespace, "weights", spec["model"], ["import os"], 16)
    (got,) = clients.ask(
        "told-front", [{"model": "told", "prompt": "import os", "max_tokens": 16, "temperature": 0}], key="none"
    )
    assert got["text"] == expected["import os"]
    run.delete()


def test_deleted_it_leaves_nothing(served: kit.Job) -> None:
    served.delete()
    kinds = "pods,services,networkpolicies,deployments,configmaps,poddisruptionbudgets"
    kit.wait_for(
        "no object of the job is left",
        lambda: not served.namespace.list(kinds, "pipelinejob.dev/job=served"),
        60,
        served.describe,
    )
    shared = "pipelinejob.dev/service=chat"
    kit.wait_for("nor the Service that it shared", lambda: not served.namespace.list("services", shared), 60)
