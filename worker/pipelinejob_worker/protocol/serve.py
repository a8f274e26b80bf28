"""How to serve a model: the part of a PipelineJob's spec for the modes Serve and Batch, and what stages tell of it.

All since protocol 4.
"""

from typing import Literal

from pydantic import ConfigDict, Field

from pipelinejob_worker.protocol.base import Wire
from pipelinejob_worker.protocol.rules import cel, rule

SERVING_SINCE = 4
"""Protocol of the first workers that serve."""

Mode = Literal["Train", "Serve", "Batch"]


class Engine(Wire):
    """What a pipeline may take, and how it computes; the same for clients' requests and for a file of them."""

    max_tokens_in_flight: int = Field(
        16384,
        ge=32,
        le=16_777_216,
        description="Most tokens of all unfinished requests that a pipeline has accepted, prompts and largest answers "
        "together; clients beyond that are told to come back later.",
    )
    key_value_cache_mib: int = Field(
        1024,
        ge=1,
        le=16_777_216,
        alias="keyValueCacheMiB",
        description="Memory of each stage for the keys and values of its layers.",
    )
    batch_tokens: int = Field(
        512,
        ge=16,
        le=65_536,
        description="Most tokens of a batch. More of them shorten the wait for long prompts and lengthen that between "
        "two tokens of an answer.",
    )
    deterministic: bool = Field(
        False,
        description="Whether a token's logits are the same bits whatever else is in its batch, and after a recovery. "
        "It costs about 40 % of the throughput.",
    )


class Batch(Engine):
    """Answer a file of requests, each exactly once."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            rule(
                ".output",
                "self.input != self.output",
                "'%s is also the input; allowed: another file'.format([self.output])",
            ),
        )
    )

    input: str = Field(
        min_length=2,
        max_length=4096,
        pattern="^/",
        description="File inside the worker container with a request on each line, as OpenAI's Batch API takes it.",
    )
    output: str = Field(
        min_length=2,
        max_length=4096,
        pattern="^/",
        description="File inside the worker container, on a volume that all stages share, for an answer on each line.",
    )


class FromJob(Wire):
    """The model of another PipelineJob, with the weights of its checkpoint."""

    name: str = Field(
        min_length=1,
        max_length=253,
        description="Name of a PipelineJob of mode Train in the same namespace, with spec.checkpoint.volumeClaimName.",
    )
    step: int = Field(
        0,
        ge=0,
        le=1_000_000_000,
        description="Step of the checkpoint; 0 is the newest at the start.",
    )


class Source(Wire):
    """Whose checkpoint holds the weights; its volume is mounted read-only at ``SOURCE_DIRECTORY``.

    Model and seed are those that it was trained with: they make the fingerprint that its manifest must have.
    """

    job: str
    seed: int = 0
    step: int = Field(0, ge=0, description="0: the newest complete one; all stages must take the same.")


class Tokenizer(Wire):
    """How text becomes tokens and back.

    ``path``: directory with tokenizer.json; empty for HuggingFace: that of the model's own repository.
    """

    name: Literal["Bytes", "HuggingFace"]
    path: str = ""


class Serving(Wire):
    """What one pipeline does for its requests, over the last seconds; only its stage 0 knows it."""

    requests_per_second: float = Field(0, ge=0, description="Finished ones.")
    prompt_tokens_per_second: float = Field(0, ge=0)
    queued: int = Field(0, ge=0, description="Accepted requests without cache.")
    running: int = Field(0, ge=0, description="Requests with cache.")
    cache_percent: float = Field(0, ge=0, le=100, description="Used share of the key-value cache.")
    preemptions: int = Field(0, ge=0, description="Since the group was formed.")
