"""How to train: the part of a PipelineJob's spec about data, schedule and optimizer."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from pipelinejob_worker.protocol.base import Wire
from pipelinejob_worker.protocol.rules import Decimal, below_one, cel, rule

ScheduleName = Literal[
    "GPipe", "1F1B", "LoopedBFS", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"
]


class Data(Wire):
    """Where the training text comes from."""

    files: list[Annotated[str, Field(min_length=1, max_length=4096)]] = Field(
        min_length=1,
        max_length=64,
        description="Glob patterns of files inside the worker container; ** matches any depth. For format Dataset: of "
        "directories.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    format: Literal["Text", "JsonLines", "Tokens", "Dataset"] = Field(
        "Text",
        description="Text: each file is a document. JsonLines: each line is an object with a document in textField. "
        "Tokens: NumPy arrays (.npy) of one dimension with token ids. Dataset: directories that the datasets library "
        "saved (save_to_disk).",
    )
    text_field: str = Field(
        "text", min_length=1, max_length=256, description="Field that holds the text, for JsonLines and Dataset."
    )
    tokenizer: Literal["Bytes", "HuggingFace"] = Field(
        "Bytes", description="How text becomes tokens: Bytes has 256 tokens; HuggingFace is read from tokenizerPath."
    )
    tokenizer_path: str = Field(
        "",
        max_length=4096,
        description="Directory with tokenizer.json; empty: that of model.huggingFace.path.",
    )
    packing: Literal["Stream", "Documents"] = Field(
        "Stream",
        description="Stream cuts the documents, one after another, into samples that may span several. Documents does "
        "the same, but no token sees another document: positions restart, attention and loss stay inside.",
    )
    validation_percent: int = Field(
        0, ge=0, le=50, description="Share of the samples that is never trained on but measured by the validation loss."
    )


class Schedule(Wire):
    """The order of forward and backward passes."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            rule(
                ".chunksPerStage",
                "!(self.name in ['GPipe', '1F1B']) || self.chunksPerStage == 1",
                "'%d chunks do not fit schedule %s; allowed: 1, or schedule LoopedBFS, Interleaved1F1B or "
                "InterleavedZeroBubble'.format([self.chunksPerStage, self.name])",
            ),
            rule(
                ".chunksPerStage",
                "!(self.name in ['ZBVZeroBubble', 'DualPipeV']) || self.chunksPerStage == 2",
                "'%d chunks do not fit schedule %s, whose chunks run down the stages and back up; allowed: 2'"
                ".format([self.chunksPerStage, self.name])",
            ),
        )
    )

    name: ScheduleName = Field(
        "1F1B",
        description="GPipe runs all forwards, then all backwards. 1F1B alternates them and holds fewer activations. "
        "LoopedBFS and Interleaved1F1B do the same with several chunks a stage and a smaller bubble. "
        "InterleavedZeroBubble, ZBVZeroBubble and DualPipeV also split the backward and fill the bubble with the "
        "weights' part.",
    )
    chunks_per_stage: int = Field(
        1, ge=1, le=16, description="Parts of the model that each stage holds, for schedules that visit it repeatedly."
    )


class Optimizer(Wire):
    """The optimizer and its learning rate over time."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            *(
                rule(
                    f".{field}",
                    below_one(field),
                    f"'%s is too large; allowed: 0 or more and less than 1'.format([self.{field}])",
                )
                for field in ("momentum", "beta1", "beta2")
            )
        )
    )

    name: Literal["AdamW", "SGD"] = Field("AdamW", description="Name of the optimizer.")
    learning_rate: Decimal = Field("3e-4", description="Learning rate after the warm-up.")
    warmup_steps: int = Field(
        0, ge=0, le=1_000_000_000, description="Steps over which the learning rate rises linearly to learningRate."
    )
    decay: Literal["Constant", "Cosine", "Linear"] = Field(
        "Constant", description="How the learning rate falls from the warm-up to the last step."
    )
    final_learning_rate: Decimal = Field("0", description="Learning rate of the last step, for Cosine and Linear.")
    weight_decay: Decimal = Field("0.1", description="Decoupled weight decay of matrices.")
    clip_norm: Decimal = Field("1.0", description="Largest global gradient norm over all stages; 0 does not clip.")
    momentum: Decimal = Field("0.9", description="Momentum of SGD; 0 has none.")
    beta1: Decimal = Field("0.9", description="Decay of AdamW's mean of gradients.")
    beta2: Decimal = Field("0.999", description="Decay of AdamW's mean of squared gradients.")


class Train(Wire):
    """How to train."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            rule(
                ".globalBatchSize",
                "self.microbatches < 1 || self.globalBatchSize % self.microbatches == 0",
                "'%d is not divisible by microbatches %d; allowed: a multiple of it'"
                ".format([self.globalBatchSize, self.microbatches])",
            ),
            rule(
                ".compile",
                "!self.compile || !(self.schedule.name in ['InterleavedZeroBubble', 'ZBVZeroBubble', 'DualPipeV'])",
                "'compiled layers cannot split their backward as schedule %s needs; allowed: false, or schedule GPipe, "
                "1F1B, LoopedBFS or Interleaved1F1B'.format([self.schedule.name])",
            ),
        )
    )

    data: Data = Field(description="Where the training text comes from.")
    steps: int = Field(ge=1, le=1_000_000_000, description="Optimizer steps of the whole job.")
    global_batch_size: int = Field(
        ge=1, le=1048576, description="Samples of a step, over all microbatches of all pipelines."
    )
    microbatches: int = Field(
        ge=1,
        le=65536,
        description="Parts of a step; each pipeline has its equal share, which follow each other down its stages.",
    )
    schedule: Schedule = Field(default_factory=Schedule, description="The order of forward and backward passes.")
    optimizer: Optimizer = Field(default_factory=Optimizer, description="The optimizer.")
    precision: Literal["Float32", "BFloat16", "Float16"] = Field(
        "Float32",
        description="Type in which matrices are multiplied. Weights and optimizer state are float32; Float16 scales "
        "the loss and skips a step whose gradients overflow.",
    )
    activation_checkpointing: bool = Field(
        False, description="Keep only each layer's input and compute the rest again in the backward pass."
    )
    compile: bool = Field(False, description="Compile each layer with torch.compile.")
    validate_every_steps: int = Field(
        100, ge=1, le=1_000_000_000, description="Steps between two validations, if validationPercent is not 0."
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Seed of weights, sample order and dropout.")
