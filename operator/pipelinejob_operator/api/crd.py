"""From the pydantic models to a CustomResourceDefinition that the API server accepts. Pure.

Pydantic writes JSON Schema 2020-12; Kubernetes wants a *structural* OpenAPI 3.0 schema: no references, no unions with
null, no ``const``, and defaults on each level so that an omitted section gets its own. The rules are those of the
Kubernetes documentation on CustomResourceDefinitions ("Specifying a structural schema", "Defaulting").
"""

from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipelinejob_operator.api import v1alpha1 as api

Schema = dict[str, Any]

CRD_NAME = f"{api.PLURAL}.{api.GROUP}"
INT32_MAX = 2**31 - 1

_DROPPED = frozenset({"title", "$defs", "additionalProperties"})


def crd() -> Schema:
    """Build the CustomResourceDefinition of PipelineJob."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": CRD_NAME},
        "spec": {
            "group": api.GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": api.KIND,
                "listKind": f"{api.KIND}List",
                "plural": api.PLURAL,
                "singular": api.KIND.lower(),
                "shortNames": [api.SHORT_NAME],
            },
            "versions": [
                {
                    "name": api.VERSION,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": structural_schema()},
                    "subresources": {
                        "status": {},
                        "scale": {
                            "specReplicasPath": ".spec.stages",
                            "statusReplicasPath": ".status.readyStages",
                            "labelSelectorPath": ".status.selector",
                        },
                    },
                    "additionalPrinterColumns": [
                        {"name": name, "jsonPath": path, "type": kind, "priority": priority}
                        for name, path, kind, priority in api.PRINTER_COLUMNS
                    ],
                }
            ],
        },
    }


def structural_schema() -> Schema:
    """Build the structural schema of the whole object."""
    schema = _object(api.PipelineJob)
    properties = schema["properties"]
    properties |= {
        "apiVersion": {"type": "string"},
        "kind": {"type": "string"},
        "metadata": {"type": "object"},
    }
    properties["status"] = _without_defaults(properties["status"])
    return {**schema, "required": ["spec"]}


def _object(model: type[BaseModel]) -> Schema:
    """Build the schema of a model: its own generated schema, made structural, with nested models inlined."""
    generated = model.model_json_schema(by_alias=True)
    schema = _structural(generated, generated.get("$defs", {}))
    _default_sections(model, schema)
    return schema


def _structural(node: Any, definitions: Schema) -> Any:
    """Rewrite one node of pydantic's schema."""
    if isinstance(node, list):
        return [_structural(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        target = definitions[node["$ref"].rpartition("/")[2]]
        node = {**target, **{key: value for key, value in node.items() if key != "$ref"}}
    if "anyOf" in node:
        (only,) = (choice for choice in node["anyOf"] if choice != {"type": "null"})
        node = {**only, **{key: value for key, value in node.items() if key != "anyOf"}}
        return _structural(node, definitions)
    if "const" in node:
        node = {**node, "enum": [node["const"]]}
    result = {
        key: {name: _structural(child, definitions) for name, child in value.items()}
        if key == "properties"
        else value
        if key in ("default", "enum", "x-kubernetes-validations")
        else _structural(value, definitions)
        for key, value in node.items()
        if key not in _DROPPED and key != "const" and not (key == "default" and value in (None, "", []))
    }
    if result.get("type") == "integer":
        result["format"] = "int32" if result.get("maximum", INT32_MAX + 1) <= INT32_MAX else "int64"
    return result


def _default_sections(model: type[BaseModel], schema: Schema) -> None:
    """Give each optional section the default ``{}``: without it the defaults inside would not be filled in."""
    for name, field in model.model_fields.items():
        child = schema["properties"].get(field.alias or name)
        section = _section(field)
        if child is None or section is None:
            continue
        if field.default_factory is not None:
            child["default"] = {}
        _default_sections(section, child)


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """Return the model behind a field that holds one object, also where it may be absent."""
    candidates = (field.annotation, *getattr(field.annotation, "__args__", ()))
    if getattr(field.annotation, "__origin__", None) in (list, dict):
        return None
    return next((kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _without_defaults(node: Any) -> Any:
    """Drop defaults: a status shows what was observed, so the API server must not invent any of it."""
    if isinstance(node, list):
        return [_without_defaults(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key: {name: _without_defaults(child) for name, child in value.items()}
        if key == "properties"
        else _without_defaults(value)
        for key, value in node.items()
        if key != "default"
    }
