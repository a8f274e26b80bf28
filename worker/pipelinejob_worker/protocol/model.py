"""Which model to train or serve: the part of a PipelineJob's spec that names its source."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from pipelinejob_worker.protocol.base import Wire
from pipelinejob_worker.protocol.rules import Decimal, below_one, cel, rule
from pipelinejob_worker.protocol.serve import FromJob


class Preset(Wire):
    """A model that ships with the worker image."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            rule(
                ".heads",
                "self.heads < 1 || self.width % self.heads == 0",
                "'%d does not divide width %d; allowed: a divisor of the width'.format([self.heads, self.width])",
            ),
            rule(
                ".dropout",
                below_one("dropout"),
                "'%s is not a probability to drop; allowed: 0 or more and less than 1'.format([self.dropout])",
            ),
        )
    )

    name: Literal["gpt"] = Field(description="Name of the preset: gpt is a decoder-only transformer over bytes.")
    layers: int = Field(ge=1, le=1024, description="Number of transformer blocks.")
    width: int = Field(ge=8, le=65536, description="Size of the hidden state.")
    heads: int = Field(ge=1, le=1024, description="Number of attention heads; must divide width.")
    context: int = Field(
        ge=2, le=1048576, description="Tokens of a training sample; most tokens of a request that is served."
    )
    dropout: Decimal = Field("0", description="Dropout probability, for instance 0.1.")
    tie_embeddings: bool = Field(
        False, description="Whether the head uses the weights of the token embedding, also when another stage has it."
    )


class HuggingFace(Wire):
    """A decoder of the transformers library, from its own directory or from a hub."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            rule(
                ".path",
                "self.path.matches('^(/.*|[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)?)$')",
                "'%s is neither a directory nor the id of a model; allowed: a path with a leading /, or an id such as "
                "Qwen/Qwen3-0.6B'.format([self.path])",
            )
        )
    )

    path: str = Field(
        min_length=1,
        max_length=4096,
        description="Directory inside the worker container with config.json and safetensors files, or the id of a "
        "model on the hub, for instance Qwen/Qwen3-0.6B. A path with a leading / is a directory.",
    )
    revision: str = Field("main", max_length=255, description="Branch, tag or commit on the hub.")
    context: int = Field(
        ge=2, le=1048576, description="Tokens of a training sample; most tokens of a request that is served."
    )


class Argument(Wire):
    """An argument of the user's function."""

    name: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=128, description="Name of the parameter.")
    value: str = Field(max_length=4096, description="Value; the function receives a string.")


class Module(Wire):
    """A model from the user's image."""

    function: str = Field(
        max_length=512,
        pattern=r"^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*$",
        description="package.module:function that returns a pipelinejob_worker.models.LayeredModel.",
    )
    arguments: list[Argument] = Field(
        [],
        max_length=64,
        description="Arguments of the function, by name.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )


_SOURCES = ("preset", "huggingFace", "module", "fromJob")
_ARE_SET = "[" + ", ".join(f"has(self.{source})" for source in _SOURCES) + "].filter(set, set)"


class Model(Wire):
    """The model, from exactly one source."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            rule(
                ".preset",
                f"size({_ARE_SET}) > 0",
                f"'no source of the model is set; allowed: one of {', '.join(_SOURCES)}'",
                "FieldValueRequired",
            ),
            rule(
                ".preset",
                f"size({_ARE_SET}) < 2",
                f"'several sources of the model are set; allowed: one of {', '.join(_SOURCES)}'",
                "FieldValueForbidden",
            ),
        )
    )

    preset: Preset | None = Field(None, description="A model that ships with the worker image.")
    hugging_face: HuggingFace | None = Field(None, description="A decoder of the transformers library.")
    module: Module | None = Field(None, description="A model from a function in the worker image.")
    from_job: FromJob | None = Field(
        None, description="The model of another PipelineJob, with the weights of its checkpoint, for Serve and Batch."
    )

    @property
    def from_hub(self) -> bool:
        """Whether the model is downloaded: a path without a leading / is the id of a model on a hub."""
        return self.hugging_face is not None and not self.hugging_face.path.startswith("/")


Layer = Annotated[int, Field(ge=1, le=100_000)]


class Partition(Wire):
    """Which layers each stage holds."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            rule(
                ".boundaries",
                "(self.strategy == 'Manual') == (has(self.boundaries) && size(self.boundaries) > 0)",
                "'boundaries and strategy %s do not fit; allowed: boundaries with strategy Manual, and only with it'"
                ".format([self.strategy])",
            ),
            rule(
                ".boundaries",
                "!has(self.boundaries) || self.boundaries.isSorted()",
                "'boundaries are not in order; allowed: ascending, each the first layer of the next chunk'",
            ),
        )
    )

    strategy: Literal["Balanced", "Even", "Manual"] = Field(
        "Balanced",
        description="Balanced measures each layer's time and memory and makes the slowest stage as fast as possible; "
        "Even gives each stage the same number of layers; Manual cuts at boundaries.",
    )
    boundaries: list[Layer] = Field(
        [],
        max_length=8191,
        description="For Manual: the first layer of every chunk but the first, counted from 0 at the embedding.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    memory_limit_mebibytes: int = Field(
        0,
        ge=0,
        le=16_777_216,
        alias="memoryLimitMiB",
        description="Memory that a stage's weights, gradients, optimizer state and activations may take; 0 is the "
        "device's own.",
    )
