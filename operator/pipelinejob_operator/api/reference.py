"""The reference page of the API, made from the schema that the API server uses. Pure."""

from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]

INTRODUCTION = """\
# PipelineJob v1alpha1

Generated from the API models by `make generate`; do not edit. `kubectl explain pj.spec` prints the same.
Changes to `stages`, `checkpoint`, `recovery`, `suspend`, `activeDeadlineSeconds`, `ttlSecondsAfterFinished` and
`podCleanupPolicy` are taken while the job runs, `checkpoint` with the stages' next pods; all other fields
cannot change.
"""


def page(schema: Schema) -> str:
    """Render the page: one table an object, widest first."""
    parts = [INTRODUCTION]
    for section in ("spec", "status"):
        for path, node in _objects(section, schema["properties"][section]):
            parts.append(_table(path, node))
    return "\n".join(parts)


def _objects(path: str, node: Schema) -> Iterator[tuple[str, Schema]]:
    """Walk over the objects below a node, itself first."""
    yield path, node
    for name, child in node.get("properties", {}).items():
        inner = child.get("items", child) if child.get("type") == "array" else child
        if "properties" in inner:
            yield from _objects(f"{path}.{name}{'[]' if inner is not child else ''}", inner)


def _table(path: str, node: Schema) -> str:
    required = node.get("required", [])
    rows = [
        f"| `{name}` | {_type(child)} | {_default(child, name in required)} | {_allowed(child)} "
        f"| {_cell(child.get('description', ''))} |"
        for name, child in node["properties"].items()
    ]
    rules = [
        f"- `{rule['rule']}`" for rule in node.get("x-kubernetes-validations", []) if "oldSelf" not in rule["rule"]
    ]
    return "\n".join(
        [
            f"## {path}",
            "",
            _cell(node.get("description", "")),
            "",
            "| field | type | default | allowed | meaning |",
            "|---|---|---|---|---|",
            *rows,
            "",
            *(["Rules (CEL):", "", *rules, ""] if rules else []),
        ]
    )


def _type(node: Schema) -> str:
    if node.get("type") == "array":
        return f"list of {_type(node['items'])}"
    return str(node.get("format") or node.get("type", "any"))


def _default(node: Schema, required: bool) -> str:
    if required:
        return "required"
    default = node.get("default")
    if default is None or default == {}:
        return ""
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _allowed(node: Schema) -> str:
    """Say what the schema allows, in words."""
    if "enum" in node:
        return ", ".join(f"`{value}`" for value in node["enum"])
    if "minimum" in node or "maximum" in node:
        return f"{node.get('minimum', '')} to {node['maximum']}" if "maximum" in node else f"{node['minimum']} or more"
    inner = node.get("items", {})
    parts = [
        f"{node.get('minItems', 0)} to {node['maxItems']} entries" if "maxItems" in node else "",
        f"matches `{_pattern(node)}`" if "pattern" in node else "",
        f"at most {node['maxLength']} characters" if "maxLength" in node else "",
        f"each at most {inner['maxLength']} characters" if "maxLength" in inner else "",
    ]
    return "; ".join(part for part in parts if part)


def _pattern(node: Schema) -> str:
    return str(node["pattern"]).replace("|", "\\|")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
