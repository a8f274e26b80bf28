"""The reference page says what the code does."""

import json
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from pipelinejob_worker.front.schema import ChatRequest, CompletionRequest
from pipelinejob_worker.front.settings import PREFIX, Limits, Settings
from tests.unit.docs.pages import DOCS, table
from tests.unit.worker.front.engines import Engine
from tests.unit.worker.front.fronts import front

PAGE = DOCS / "reference/openai-api.md"


def test_every_variable_is_explained_with_its_default() -> None:
    written = {name: default for name, default, *_ in table(PAGE, "Limits of a front")}
    assert written == {name.upper(): f"{field.default}" for name, field in Limits.model_fields.items()}
    named = [name for name, *_ in table(PAGE, "Settings of a front")]
    assert named == [name.upper() for name in Settings.model_fields]
    assert all(field.alias == PREFIX + name.upper() for name, field in Limits.model_fields.items())


def test_every_parameter_is_explained() -> None:
    written = {name.strip().split(".")[0] for names, *_ in table(PAGE, "Parameters") for name in names.split(",")}
    assert written == CompletionRequest.model_fields.keys() | ChatRequest.model_fields.keys()


async def test_every_metric_is_explained(tmp_path: Path) -> None:
    async with Engine() as engine, front(tmp_path, engine) as server:
        await server.complete()
        _, text = await server.get("/metrics")
    shown = {}
    for family in text_string_to_metric_families(text):
        if not family.name.endswith("_created"):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            labels = {label for sample in family.samples for label in sample.labels} - {"le"}
            shown[name] = (family.type, ", ".join(sorted(labels)))
    written = {name: (kind, labels) for name, kind, labels, _ in table(PAGE, "Metrics of a front")}
    assert written == shown


async def test_the_routes_are_those_of_the_page(tmp_path: Path) -> None:
    routes = [route for routes, _ in table(PAGE, "Routes") for route in routes.split(", ")]
    async with Engine() as engine, front(tmp_path, engine) as server:
        for route in routes:
            method, path = route.replace("NAME", "tiny").split()
            headers = {"Content-Type": "application/json"}
            async with server.http.request(method, path, data=json.dumps({}), headers=headers) as response:
                assert response.status == (400 if method == "POST" else 200), route
