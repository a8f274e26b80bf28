"""What a front is told by its environment."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipelinejob_worker.errors import ConfigurationError
from pipelinejob_worker.serve.wire import MAX_SECONDS, MAX_TOKENS

PREFIX = "PIPELINEJOB_FRONT_"


class Limits(BaseModel):
    """What a front accepts and how long it waits. Each is set by the variable of its name, for instance
    ``PIPELINEJOB_FRONT_BODY_BYTES``.
    """

    model_config = ConfigDict(frozen=True, alias_generator=lambda name: PREFIX + name.upper(), populate_by_name=True)

    body_bytes: int = Field(4 << 20, ge=1024, le=64 << 20, description="Largest body of a request, decompressed.")
    body_seconds: float = Field(30, gt=0, le=3600, description="Time for a client to send its body.")
    prompt_tokens: int = Field(131_072, ge=1, le=MAX_TOKENS, description="Most tokens of one prompt.")
    output_tokens: int = Field(32_768, ge=1, le=MAX_TOKENS, description="Most tokens of one choice.")
    choices: int = Field(64, ge=1, le=4096, description="Most choices of one request: prompts times `n`.")
    request_seconds: float = Field(
        600, gt=0, le=MAX_SECONDS, description="From a request's acceptance to its last token."
    )
    requests: int = Field(512, ge=1, le=100_000, description="Most choices that are waiting or running at a time.")
    held_tokens: int = Field(
        1 << 20, ge=1, description="Most prompt tokens and output tokens of these choices when another one is accepted."
    )
    recovery_seconds: float = Field(
        60, gt=0, le=3600, description="How long an accepted request waits for an engine that can go on with it."
    )
    silence_seconds: float = Field(
        10,
        gt=0,
        le=600,
        description="After this time without a word an engine is taken for dead; it speaks each second.",
    )
    stall_seconds: float = Field(60, gt=0, le=3600, description="After this time a client that does not read is left.")
    drain_seconds: float = Field(25, ge=0, le=3600, description="Time to finish accepted requests after SIGTERM.")


class Settings(BaseModel):
    """What is served, from where, to whom; set by variables of the same names."""

    model_config = ConfigDict(frozen=True, alias_generator=lambda name: PREFIX + name.upper(), populate_by_name=True)

    model: str = Field(min_length=1, max_length=253, description="Name of the model, as clients say it.")
    engines_file: Path = Field(
        Path("/etc/pipelinejob/engines"),
        description="Addresses of the engines, one `host:port` a line; line k is stage 0 of pipeline k.",
    )
    tokenizer: Literal["Bytes", "HuggingFace"] = Field("HuggingFace", description="How text becomes tokens.")
    tokenizer_directory: Path = Field(
        Path("/model"), description="Directory with tokenizer.json, tokenizer_config.json, chat_template.jinja."
    )
    host: str = Field("", description="Address to serve on; empty: all.")
    port: int = Field(8000, ge=0, le=65535, description="TCP port to serve on.")
    bearer_token_file: Path | None = Field(
        None, description="File with the token that clients must send; read for each request. Unset: no token."
    )


def from_environment(environment: Mapping[str, str]) -> tuple[Settings, Limits]:
    """Read settings and limits. Raises ConfigurationError that names the variable."""
    known = {name: value for name, value in environment.items() if name.startswith(PREFIX) and value}
    try:
        return Settings.model_validate(known), Limits.model_validate(known)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        given = f"'{str(first['input'])[:64]}'" if first["type"] != "missing" else "nothing"
        raise ConfigurationError(
            f"{first['loc'][0]}: {given} cannot be used: {first['msg']}; correct the variable of the front's pod"
        ) from error
