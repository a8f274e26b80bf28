"""How the protocol's models say what the API server checks (CEL), and numbers that are not integers."""

from typing import Annotated, Any

from pydantic import Field

_DECIMAL = r"^[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]{1,2})?$"

Decimal = Annotated[str, Field(max_length=32, pattern=_DECIMAL)]
"""A non-negative number as a string, as the Kubernetes API conventions allow no floats; never infinite."""


def cel(*rules: dict[str, str]) -> dict[str, Any]:
    """Schema extension with CEL rules."""
    return {"x-kubernetes-validations": list(rules)}


def rule(field: str, holds: str, message: str, reason: str = "FieldValueInvalid") -> dict[str, str]:
    """A rule that must hold. ``field`` is the path, from the rule's own object, that the API server blames.

    ``message`` is a CEL expression: what is wrong with the value, and what is allowed. ``reason`` is the API server's
    word for the kind of fault, which it prints between the field and the message.
    """
    return {"rule": holds, "messageExpression": message, "fieldPath": field, "reason": reason}


def below_one(field: str) -> str:
    """Condition that a Decimal is less than 1; one that is no number is left to its pattern, which says so."""
    return f"!self.{field}.matches(r'{_DECIMAL}') || double(self.{field}) < 1.0"
