"""Chat templates, rendered as transformers renders them (its ``apply_chat_template`` is the reference)."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.front.refusals import invalid


class ChatTemplate:
    """A compiled template. Raises ConfigurationError when the source is no template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigurationError(
                f"serve: the model's chat template is no Jinja template: line {error.lineno}: {error.message}; "
                "correct chat_template.jinja in the model's directory"
            ) from error
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]) -> str:
        """Return the prompt that asks for the next message of the assistant. Raises ApiError."""
        given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
        try:
            return self._template.render({**self._special_tokens, **arguments, **given})
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise invalid("messages", f"The model's chat template refuses the messages: {error}") from error


class _Generation(Extension):
    """``{% generation %}`` marks what the assistant says, for training; in a prompt it is its content."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _to_json(value: object, ensure_ascii: bool = False, **options: Any) -> str:
    """Unlike Jinja's own filter, do not escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    """Return the local time, which templates mean."""
    return datetime.now().strftime(form)
