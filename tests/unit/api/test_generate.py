"""What is made from the models is fresh, and structural."""

from collections.abc import Iterator
from typing import Any

from pipelinejob_operator.api import crd
from tools.generate import ROOT, stale

RULES = "x-kubernetes-validations"


def nodes(schema: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Walk over every schema node below one, itself first."""
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    if "items" in schema:
        yield from nodes(schema["items"], f"{path}[]")


def test_generated_files_hold_what_the_models_say() -> None:
    assert stale(ROOT) == []


def test_every_node_is_structural() -> None:
    for path, node in nodes(crd.structural_schema()):
        assert node.get("type") or node.get("x-kubernetes-int-or-string"), path
        assert not {"$ref", "anyOf", "oneOf", "allOf", "const", "title", "additionalProperties"} & set(node), path


def test_every_field_of_the_spec_is_described_and_bounded() -> None:
    for path, node in nodes(crd.structural_schema()["properties"]["spec"], "spec"):
        if path.startswith("spec.template."):
            continue
        if not path.endswith("[]"):
            assert node.get("description"), f"{path} has no description"
        if node["type"] == "array":
            assert "maxItems" in node, f"{path} has no bound"
            assert "x-kubernetes-list-type" in node, f"{path} does not say how it merges"
        if node["type"] == "string":
            assert "maxLength" in node or "enum" in node, f"{path} has no bound"
        if node["type"] == "integer":
            assert {"minimum", "maximum"} <= set(node), f"{path} has no bounds"


def test_omitted_sections_get_their_defaults() -> None:
    spec = crd.structural_schema()["properties"]["spec"]["properties"]
    assert spec["gpu"]["default"] == {}
    assert spec["gpu"]["properties"]["count"]["default"] == 1
    schedule = spec["train"]["properties"]["schedule"]
    assert schedule["default"] == {"name": "1F1B", "chunksPerStage": 1}, "its rules are tried on the default itself"
    assert "default" not in spec["train"], "a required section has no default"
    assert "default" not in spec["template"], "an absent template stays absent"


def test_the_api_server_invents_no_status_but_keys_that_entries_of_older_operators_lack() -> None:
    status = crd.structural_schema()["properties"]["status"]
    invented = {path: node["default"] for path, node in nodes(status, "status") if "default" in node}
    assert invented == {"status.stages[].pipeline": 0}


def test_every_key_of_a_list_is_required_or_has_a_default() -> None:
    for path, node in nodes(crd.structural_schema()):
        for key in node.get("x-kubernetes-list-map-keys", []):
            items = node["items"]
            assert key in items["required"] or "default" in items["properties"][key], f"{path}: {key}"


def test_every_rule_blames_a_field() -> None:
    rules = [(path, rule) for path, node in nodes(crd.structural_schema()) for rule in node.get(RULES, [])]
    assert rules
    for path, rule in rules:
        blamed = f"{path}{rule['fieldPath']}"
        assert blamed in {name for name, _ in nodes(crd.structural_schema())}, f"{blamed} does not exist"
        assert rule["messageExpression"]
