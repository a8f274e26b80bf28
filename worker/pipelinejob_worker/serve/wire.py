"""What a front and stage 0 tell each other: JSON lines over one TCP connection.

Stage 0 speaks first: ``Ready``. Then the front sends ``Submit`` and ``Cancel``, and stage 0 answers each ``Submit``
with either one ``Refused``, or any number of ``Token`` in ascending position and then one ``Finished``; ``Stats`` comes
about once a second, and at least every two, whatever is being computed. When the connection ends, stage 0 drops the
requests that came over it. When the group of stages breaks, stage 0 ends all connections: the front connects again and
submits what is unfinished, with the tokens it has.
"""

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from pipelinejob_worker.protocol.base import Wire

LINE_LIMIT_BYTES = 16 << 20
"""Longest line either way; the longest prompt needs less than half of it."""

MAX_TOKENS = 1 << 20
"""Most tokens of a request, prompt and output together."""

MAX_SECONDS = 86_400.0
"""Longest time for a request."""

MAX_TOP_LOGPROBS = 20

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
RequestId = Annotated[str, Field(min_length=1, max_length=128)]


class Sampling(Wire):
    """How the next token is drawn from the logits; a function of these, the logits, the seed and the position."""

    temperature: float = Field(1.0, ge=0, le=100, allow_inf_nan=False, description="0 takes the likeliest token.")
    top_k: int = Field(0, ge=0, description="Draw among that many likeliest tokens; 0 is all.")
    top_p: float = Field(1.0, gt=0, le=1, description="Draw among the fewest likeliest tokens with this share.")
    seed: int = Field(0, ge=-(1 << 63), lt=1 << 63, description="A front without one from its client draws one.")
    logprobs: bool = Field(False, description="Whether tokens carry the natural logarithm of their probability.")
    top_logprobs: int = Field(0, ge=0, le=MAX_TOP_LOGPROBS, description="Likeliest tokens to name at each position.")


class Submit(Wire):
    """Generate tokens. ``emitted_token_ids`` are those of an earlier epoch; generation goes on behind them."""

    kind: Literal["submit"] = "submit"
    request_id: RequestId = Field(description="Unique among the unfinished requests of the connection.")
    prompt_token_ids: list[TokenId] = Field(min_length=1, max_length=MAX_TOKENS)
    emitted_token_ids: list[TokenId] = Field([], max_length=MAX_TOKENS)
    sampling: Sampling = Sampling()
    max_tokens: int = Field(ge=1, le=MAX_TOKENS, description="Most tokens to emit, those emitted earlier included.")
    stop: list[Annotated[str, Field(min_length=1, max_length=1024)]] = Field(
        [], max_length=16, description="Texts that end the request with the token that completes one (see text.py)."
    )
    stop_token_ids: list[TokenId] = Field(
        [], max_length=256, description="Tokens that end the request, the model's end of sequence among them; emitted."
    )
    deadline_seconds: float = Field(600.0, gt=0, le=MAX_SECONDS, description="From receipt to the last token.")
    priority: int = Field(0, ge=-1000, le=1000, description="Larger ones are admitted first.")


class Cancel(Wire):
    """Nobody waits for the request any more; unknown and finished ones are ignored."""

    kind: Literal["cancel"] = "cancel"
    request_id: RequestId


class Ready(Wire):
    """The group is formed; what requests it can take."""

    kind: Literal["ready"] = "ready"
    epoch: int = Field(ge=0, description="Of the group; larger than that of every group before.")
    vocabulary: int = Field(ge=1, description="Token ids are below it.")
    context: int = Field(ge=1, description="Most tokens of a request, prompt and output together, that can ever fit.")
    deterministic: bool = Field(description="Whether tokens do not depend on other requests, splits or restarts.")


class Alternative(Wire):
    """A likely token at a position."""

    token_id: TokenId
    logprob: float


class Token(Wire):
    """One token. ``position`` counts prompt and output: the first token behind a prompt of n tokens has position n."""

    kind: Literal["token"] = "token"
    request_id: RequestId
    position: int = Field(ge=1)
    token_id: TokenId
    epoch: int = Field(ge=0, description="A front drops tokens of an older epoch than the newest Ready's.")
    logprob: float | None = Field(None, description="Before temperature, top-k and top-p.")
    top_logprobs: list[Alternative] = Field([], max_length=MAX_TOP_LOGPROBS)


class Finished(Wire):
    """No more tokens come. ``message`` is one line, for ``error`` only."""

    kind: Literal["finished"] = "finished"
    request_id: RequestId
    reason: Literal["stop", "length", "cancelled", "deadline", "error"]
    message: str = ""


class Refused(Wire):
    """The request was not accepted, and has no tokens.

    ``too_large``: longer than the context or the whole cache, and never possible. ``invalid``: a token id outside the
    vocabulary, an id in use, or texts to stop at without a tokenizer. ``overloaded``: try again after
    ``retry_after_seconds``.
    """

    kind: Literal["refused"] = "refused"
    request_id: RequestId
    reason: Literal["too_large", "invalid", "overloaded"]
    message: str
    retry_after_seconds: float | None = None


class Stats(Wire):
    """Of the whole group, over the last second or so."""

    kind: Literal["stats"] = "stats"
    epoch: int = Field(ge=0)
    queued: int = Field(ge=0, description="Accepted requests without cache.")
    running: int = Field(ge=0, description="Requests with cache.")
    batches_in_flight: int = Field(ge=0)
    cache_blocks: int = Field(ge=0, description="Blocks of the key-value cache, of each stage.")
    cache_blocks_used: int = Field(ge=0)
    prompt_tokens_per_second: float = Field(ge=0)
    tokens_per_second: float = Field(ge=0, description="Emitted ones.")
    preemptions: int = Field(ge=0, description="Since the group was formed.")
    bubble_percent: float = Field(ge=0, le=100, description="Mean share of the time that stages were idle.")
    requests_per_second: float = Field(0.0, ge=0, description="Requests that got all their tokens.")
    stage_busy_percent: list[float] = Field([], max_length=512, description="Of each stage, once a batch came back.")


ToEngine = Annotated[Submit | Cancel, Field(discriminator="kind")]
ToFront = Annotated[Ready | Token | Finished | Refused | Stats, Field(discriminator="kind")]

TO_ENGINE: TypeAdapter[Submit | Cancel] = TypeAdapter(ToEngine)
TO_FRONT: TypeAdapter[Ready | Token | Finished | Refused | Stats] = TypeAdapter(ToFront)


def to_line(message: Wire) -> bytes:
    """Render one message as a line; ``TO_ENGINE.validate_json`` and ``TO_FRONT.validate_json`` read it."""
    return message.to_json().encode() + b"\n"
