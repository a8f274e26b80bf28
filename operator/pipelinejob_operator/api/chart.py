"""From the models of the chart's values to the files that Helm and its users read. Pure."""

import json
import textwrap
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from pipelinejob_operator.api.chart_values import Values

WIDTH = 120
INDENT = "  "

SCHEMA_DRAFT = "http://json-schema.org/draft-07/schema#"
"""The newest that every Helm 3 and Helm 4 reads."""

README = """\
# Chart pipelinejob

Installs the operator of [PipelineJobs](../../README.md): Kubernetes 1.34 to 1.37, Helm 3 or 4.
[How to install](../../docs/how-to/install.md) explains the choices.

```sh
helm install pipelinejob charts/pipelinejob --namespace pipelinejob-system --create-namespace
```

## Values

Generated from `api/chart_values.py` by `make generate`; do not edit.

| value | default | meaning |
|---|---|---|
{rows}
"""


def values_schema() -> str:
    """Render ``values.schema.json``: a value that is not in the models is refused."""
    schema = Values.model_json_schema(by_alias=True, ref_template="#/definitions/{model}")
    definitions = schema.pop("$defs")
    # Helm adds it to the values of every chart that is part of another one.
    schema["properties"]["global"] = {"type": "object"}
    return json.dumps({"$schema": SCHEMA_DRAFT, **_plain(schema), "definitions": _plain(definitions)}, indent=2) + "\n"


def values_yaml(header: str) -> str:
    """Render ``values.yaml``: every value with its default and what it means."""
    return "\n".join((header, *_lines(Values(), "")))


def readme() -> str:
    """Render the chart's README with one row a value."""
    rows = (f"| `{path}` | `{_json(value)}` | {text} |" for path, value, text in _leaves(Values(), ""))
    return README.format(rows="\n".join(rows))


def _plain(node: Any) -> Any:
    """Drop what only Python knows: the titles made from names, and the models' docstrings with them."""
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {key: _plain(value) for key, value in node.items() if not (key == "title" and isinstance(value, str))}


def _members(model: BaseModel) -> Iterator[tuple[str, Any, str]]:
    """Name, value and description of each member; a section is described by its own model."""
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        text = (type(value).__doc__ or "") if isinstance(value, BaseModel) else field.description
        yield field.alias or name, value, " ".join((text or "").split())


def _lines(model: BaseModel, indent: str) -> Iterator[str]:
    for name, value, text in _members(model):
        yield from textwrap.wrap(text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:"
            yield from _lines(value, indent + INDENT)
        else:
            yield f"{indent}{name}: {_json(value)}"
        if not indent:
            yield ""


def _leaves(model: BaseModel, prefix: str) -> Iterator[tuple[str, Any, str]]:
    for name, value, text in _members(model):
        if isinstance(value, BaseModel):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value, text.replace("|", "\\|")


def _json(value: Any) -> str:
    """JSON is YAML too, and the same in every version of it."""
    return json.dumps(value)
