"""What to train: the part of a PipelineJob's spec that the worker reads as the user wrote it.

The operator's API uses these very models, so the descriptions here are what ``kubectl explain`` prints and the
``x-kubernetes-validations`` (CEL) are what the API server checks.
"""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from pipelinejob_worker.protocol.base import Wire
from pipelinejob_worker.protocol.environment import PROTOCOL_VERSION

Decimal = Annotated[str, Field(max_length=32, pattern=r"^[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?$")]
"""A non-negative number as a string: the Kubernetes API conventions allow no floats."""


def cel(*rules: dict[str, str]) -> dict[str, Any]:
    """Schema extension with CEL rules."""
    return {"x-kubernetes-validations": list(rules)}


def rule(field: str, holds: str, message: str, reason: str = "FieldValueInvalid") -> dict[str, str]:
    """A rule that must hold. ``field`` is the path, from the rule's own object, that the API server blames.

    ``message`` is a CEL expression: what is wrong with the value, and what is allowed. ``reason`` is the API server's
    word for the kind of fault, which it prints between the field and the message.
    """
    return {"rule": holds, "messageExpression": message, "fieldPath": field, "reason": reason}


class Preset(Wire):
    """A model that ships with the worker image."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            rule(
                ".heads",
                "self.width % self.heads == 0",
                "'%d does not divide width %d; allowed: a divisor of the width'.format([self.heads, self.width])",
            ),
            rule(
                ".dropout",
                "double(self.dropout) < 1.0",
                "'%s is not a probability to drop; allowed: 0 or more and less than 1'.format([self.dropout])",
            ),
        )
    )

    name: Literal["gpt"] = Field(description="Name of the preset: gpt is a decoder-only transformer over bytes.")
    layers: int = Field(ge=1, le=1024, description="Number of transformer blocks.")
    width: int = Field(ge=8, le=65536, description="Size of the hidden state.")
    heads: int = Field(ge=1, le=1024, description="Number of attention heads; must divide width.")
    context: int = Field(ge=2, le=1048576, description="Tokens of a training sample.")
    dropout: Decimal = Field("0", description="Dropout probability, for instance 0.1.")


class Model(Wire):
    """The model, from exactly one source."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            rule(
                ".preset", "has(self.preset)", "'no source of the model is set; allowed: preset'", "FieldValueRequired"
            )
        )
    )

    preset: Preset | None = Field(None, description="A model that ships with the worker image.")


class Data(Wire):
    """Where the training text comes from."""

    files: list[Annotated[str, Field(min_length=1, max_length=4096)]] = Field(
        min_length=1,
        max_length=64,
        description="Glob patterns of files inside the worker container; ** matches any depth.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    format: Literal["Text"] = Field("Text", description="How the files are read.")
    tokenizer: Literal["Bytes"] = Field("Bytes", description="How text becomes tokens: Bytes has 256 tokens.")


class Schedule(Wire):
    """The order of forward and backward passes."""

    name: Literal["GPipe", "1F1B"] = Field(
        "1F1B",
        description="GPipe runs all forwards, then all backwards. 1F1B alternates them, holds fewer activations "
        "and needs at least as many microbatches as stages.",
    )


class Optimizer(Wire):
    """The optimizer."""

    name: Literal["AdamW"] = Field("AdamW", description="Name of the optimizer.")
    learning_rate: Decimal = Field("3e-4", description="Learning rate.")
    weight_decay: Decimal = Field("0.1", description="Decoupled weight decay of matrices.")
    clip_norm: Decimal = Field("1.0", description="Largest global gradient norm over all stages; 0 does not clip.")


class Train(Wire):
    """How to train."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            rule(
                ".globalBatchSize",
                "self.globalBatchSize % self.microbatches == 0",
                "'%d is not divisible by microbatches %d; allowed: a multiple of it'"
                ".format([self.globalBatchSize, self.microbatches])",
            )
        )
    )

    data: Data = Field(description="Where the training text comes from.")
    steps: int = Field(ge=1, le=1_000_000_000, description="Optimizer steps of the whole job.")
    global_batch_size: int = Field(ge=1, le=1048576, description="Samples of a step, over all microbatches.")
    microbatches: int = Field(ge=1, le=65536, description="Parts of a step that follow each other down the pipeline.")
    schedule: Schedule = Field(default_factory=Schedule, description="The order of forward and backward passes.")
    optimizer: Optimizer = Field(default_factory=Optimizer, description="The optimizer.")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Seed of weights, sample order and dropout.")


class Checkpoint(Wire):
    """Where and how often the state is saved."""

    volume_claim_name: str = Field(
        "",
        max_length=253,
        description="PersistentVolumeClaim in the job's namespace. Empty: no checkpoints. Stages on several nodes "
        "need the access mode ReadWriteMany; with ReadWriteOnce all stages are kept on one node.",
    )
    every_steps: int = Field(50, ge=1, le=1_000_000_000, description="Steps between two checkpoints.")
    keep: int = Field(2, ge=1, le=1000, description="Checkpoints to keep; older ones are deleted.")


class WorkerConfig(Wire):
    """What the operator hands to every stage of a job, unchanged between restarts.

    ``oldest_reader`` is the oldest version whose workers know all that this job uses: a feature that is newer must
    raise it, or an older image would train without the feature and say nothing.
    """

    protocol_version: int = PROTOCOL_VERSION
    oldest_reader: int = 1
    job: str
    job_uid: str
    model: Model
    train: Train
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
