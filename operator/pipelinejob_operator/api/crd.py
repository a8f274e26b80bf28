"""From the pydantic models to a CustomResourceDefinition that the API server accepts. Pure.

Pydantic writes JSON Schema 2020-12; Kubernetes wants a *structural* OpenAPI 3.0 schema: no references, no unions with
null, no ``const``, and defaults on each level so that an omitted section gets its own. The rules are those of the
Kubernetes documentation on CustomResourceDefinitions ("Specifying a structural schema", "Defaulting").
"""

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipelinejob_operator.api import v1alpha1 as api

Schema = dict[str, Any]

CRD_NAME = f"{api.PLURAL}.{api.GROUP}"
INT32_MAX = 2**31 - 1

_DROPPED = frozenset({"title", "$defs", "additionalProperties"})
_EMPTY: tuple[object, ...] = (None, "", [])
"""Defaults that say nothing: absent is the same."""


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
                "categories": ["all"],
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
        # The name is here for the rule that blames it.
        "metadata": {"type": "object", "properties": {"name": {"type": "string"}}},
    }
    properties["status"] = _without_defaults(properties["status"])
    return {**schema, "required": ["spec"]}


def _object(model: type[BaseModel]) -> Schema:
    """Build the schema of a model: its own generated schema, made structural, with nested models inlined."""
    generated = model.model_json_schema(by_alias=True)
    schema = _structural(generated, generated.get("$defs", {}))
    _default_sections(model, schema)
    return schema


def _structural(node: Schema, definitions: Schema) -> Schema:
    """Rewrite one node of pydantic's schema, and the nodes below it."""
    if "$ref" in node:
        target = definitions[node["$ref"].rpartition("/")[2]]
        return _structural({**target, **_without("$ref", node)}, definitions)
    if "anyOf" in node:
        (only,) = (choice for choice in node["anyOf"] if choice != {"type": "null"})
        return _structural({**only, **_without("anyOf", node)}, definitions)
    kept = {
        key: value for key, value in node.items() if key not in _DROPPED and not (key == "default" and value in _EMPTY)
    }
    result = _with_children(kept, lambda child: _structural(child, definitions))
    if "const" in result:
        result["enum"] = [result.pop("const")]
    if result.get("type") == "integer":
        result["format"] = "int32" if result.get("maximum", INT32_MAX + 1) <= INT32_MAX else "int64"
    return result


def _without(key: str, node: Schema) -> Schema:
    return {name: value for name, value in node.items() if name != key}


def _with_children(node: Schema, change: Callable[[Schema], Schema]) -> Schema:
    """Apply a change to each node right below one."""
    changed: Schema = {}
    if "properties" in node:
        changed["properties"] = {name: change(child) for name, child in node["properties"].items()}
    if "items" in node:
        changed["items"] = change(node["items"])
    return {**node, **changed}


def _default_sections(model: type[BaseModel], schema: Schema) -> None:
    """Give each optional section the default ``{}``: without it the defaults inside would not be filled in.

    A section with rules gets its whole content: the API server tries them on the default before it fills that in.
    """
    for name, field in model.model_fields.items():
        child = schema["properties"].get(field.alias or name)
        section = _section(field)
        if child is None or section is None:
            continue
        _default_sections(section, child)
        if field.default_factory is not None:
            filled = {name: node["default"] for name, node in child["properties"].items() if "default" in node}
            child["default"] = filled if "x-kubernetes-validations" in child else {}


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """Return the model behind a field that holds one object, also where it may be absent."""
    candidates = (field.annotation, *getattr(field.annotation, "__args__", ()))
    if getattr(field.annotation, "__origin__", None) in (list, dict):
        return None
    return next((kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _without_defaults(node: Schema) -> Schema:
    """Drop defaults: a status shows what was observed, so the API server must not invent any of it.

    Keys of a list map keep theirs: each must be required or have a default, and entries of older operators lack some.
    """
    stripped = _with_children(_without("default", node), _without_defaults)
    keys = {key: node["items"]["properties"][key] for key in node.get("x-kubernetes-list-map-keys", ())}
    if not any("default" in key for key in keys.values()):
        return stripped
    items = stripped["items"]
    return {**stripped, "items": {**items, "properties": items["properties"] | keys}}
