"""Bodies of requests, as the API reference of OpenAI describes them; what would change the answer and cannot be had
is refused, not ignored.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pipelinejob_worker.serve.wire import MAX_TOP_LOGPROBS

_MOST_STOPS = 16
_COMPLETION_TOKENS = 16
"""OpenAI's default of ``max_tokens`` for completions."""


def _one_of(expected: str) -> WrapValidator:
    """Report a value that fits no member of a union in one sentence, without the names of the members."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            raise PydanticCustomError("none_of", "Input should be {expected}", {"expected": expected}) from error

    return WrapValidator(validate)


_Stop = Annotated[str, Field(min_length=1, max_length=1024)]
_Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(min_length=1)]


class Body(BaseModel):
    """Base of all bodies and their parts: types are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False
    """Accepted; nothing is obfuscated."""


class Request(Body):
    """What both kinds of completions have in common."""

    model: str = Field(min_length=1)
    n: int = Field(1, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: Annotated[
        _Stop | Annotated[list[_Stop], Field(max_length=_MOST_STOPS)] | None,
        _one_of(f"a string or a list of up to {_MOST_STOPS} strings, each of 1 to 1024 characters"),
    ] = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    top_k: int = Field(0, ge=-1, description="Not OpenAI's: draw among that many likeliest tokens; 0 and -1 are all.")
    ignore_eos: bool = Field(False, description="Not OpenAI's: go on behind the model's end of an answer.")

    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @field_validator("frequency_penalty", "presence_penalty", "logit_bias")
    @classmethod
    def _without_effect(cls, value: object) -> object:
        if value:
            raise ValueError("it is not available here; leave it out")
        return value

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are allowed only with stream=true")
        return self


class CompletionRequest(Request):
    """Body of ``/v1/completions``."""

    prompt: Annotated[
        str | _Tokens | Annotated[list[str], Field(min_length=1)] | Annotated[list[_Tokens], Field(min_length=1)],
        _one_of("a string, a list of token ids, or a list of either, none of them an empty list"),
    ]
    max_tokens: int | None = Field(_COMPLETION_TOKENS, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool = False
    best_of: int | None = Field(None, ge=1)
    suffix: Literal[""] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    @model_validator(mode="after")
    def _only_what_can_be_had(self) -> Self:
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError("best_of must equal n: all choices are returned")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo together with logprobs is not available: prompts have no log probabilities")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens must be at least 1 without echo")
        return self


class TextPart(Body):
    """A part of a message; other types than text are not available."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message; members that only the template knows are handed to it."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    role: str = Field(min_length=1, max_length=64)
    content: Annotated[str | list[TextPart] | None, _one_of("a string or a list of parts of the type text")] = None

    def for_template(self) -> dict[str, Any]:
        """Return the message as templates read it: text as one string, nothing that is None."""
        values = self.model_dump(exclude_none=True)
        if isinstance(self.content, list):
            values["content"] = "\n".join(part.text for part in self.content)
        return values


class ResponseFormat(Body):
    """Form of the answer: text."""

    type: Literal["text"]


class ChatRequest(Request):
    """Body of ``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] = Field({}, description="Not OpenAI's: further variables of the template.")

    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @field_validator("tools")
    @classmethod
    def _no_tools(cls, value: list[Any] | None) -> list[Any] | None:
        if value:
            raise ValueError("tools are not available here; leave it out")
        return value

    @model_validator(mode="after")
    def _alternatives_need_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is allowed only with logprobs=true")
        return self
