"""Errors as clients of the OpenAI API get them."""

import math
from typing import Any

from pydantic import ValidationError

INVALID = "invalid_request_error"
OVERLOAD_RETRY_SECONDS = 1.0
OUTAGE_RETRY_SECONDS = 5.0


class ApiError(Exception):
    """A request that is answered with an error.

    ``param`` names the member of the request's body that is to blame. ``retry_after``: seconds after which trying
    again may help. ``retry`` tells clients of OpenAI whether to try again by themselves, where the status misleads.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = INVALID,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        retry: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self._body = {"message": message, "type": kind, "param": param, "code": code}
        self.code = code or kind
        self.headers: dict[str, str] = {}
        if retry_after is not None:
            self.headers["Retry-After"] = str(max(1, math.ceil(retry_after)))
        if retry is not None:
            self.headers["X-Should-Retry"] = str(retry).lower()
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    def body(self) -> dict[str, Any]:
        """Return the JSON object of the answer or event."""
        return {"error": self._body}


def invalid(param: str, message: str, code: str | None = None) -> ApiError:
    """Blame a member of the body."""
    return ApiError(400, message, param=param, code=code)


def too_long(param: str, message: str) -> ApiError:
    """Refuse what no engine could ever hold."""
    return invalid(param, message, "context_length_exceeded")


def overloaded(message: str, retry_after: float = OVERLOAD_RETRY_SECONDS) -> ApiError:
    """Refuse what fits later."""
    return ApiError(429, message, "rate_limit_error", code="rate_limit_exceeded", retry_after=retry_after)


def unavailable(message: str, retry_after: float = OUTAGE_RETRY_SECONDS) -> ApiError:
    """Refuse while nothing can serve."""
    return ApiError(503, message, "server_error", code="service_unavailable", retry_after=retry_after)


def out_of_time(seconds: float) -> ApiError:
    """End a request that took too long; the client should not repeat it by itself."""
    message = f"The request took longer than {seconds:g} seconds; ask for fewer tokens, or stream and go on from there."
    return ApiError(504, message, "server_error", code="deadline_exceeded", retry=False)


def failed(message: str, *, retry: bool | None = None) -> ApiError:
    """Report a fault that is not the client's."""
    return ApiError(500, message, "server_error", code="internal_error", retry=retry)


def of_validation(error: ValidationError) -> ApiError:
    """Blame the first member that does not fit the schema."""
    first = error.errors(include_url=False, include_context=False)[0]
    path = ".".join(str(part) for part in first["loc"])[:200]
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is not valid JSON: {first['msg']}.", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return invalid(path, f"Unrecognized request argument supplied: {path}.", "unknown_parameter")
    if first["type"] == "missing":
        return invalid(path, f"Missing required parameter: '{path}'.", "missing_required_parameter")
    if not path:
        return ApiError(400, f"{first['msg'].removeprefix('Value error, ')}.", code="invalid_value")
    if first["type"] == "value_error":
        return invalid(
            path, f"Invalid value for '{path}': {first['msg'].removeprefix('Value error, ')}.", "invalid_value"
        )
    given = repr(first["input"])
    shown = given if len(given) <= 64 else f"{given[:61]}..."
    return invalid(path, f"Invalid value for '{path}': {shown}. {first['msg']}.", "invalid_value")
