"""The API ``pipelinejob.dev/v1alpha1``: these models are its single source.

``crd.py`` turns them into ``crds/``; the descriptions are what ``kubectl explain`` prints. Rules that CEL can say are
here; what it cannot say is checked by ``policy/acceptance.py`` and becomes the condition ``Accepted=False``.
"""

from typing import Any, Literal

from pydantic import ConfigDict, Field

from pipelinejob_operator.api.network import Network
from pipelinejob_operator.api.placement import Placement
from pipelinejob_operator.api.recovery import Elasticity, Recovery
from pipelinejob_operator.api.serving import Serve, section_rules
from pipelinejob_operator.api.status import MAX_PODS, Status
from pipelinejob_worker.protocol import Batch, Checkpoint, Env, Mode, Model, Partition, Train
from pipelinejob_worker.protocol.base import Wire
from pipelinejob_worker.protocol.rules import cel, rule

GROUP = "pipelinejob.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "PipelineJob"
PLURAL = "pipelinejobs"
SHORT_NAME = "pj"

MAX_STAGES = 512
MAX_PIPELINES = 64
MAX_NAME = 40
"""Pod names add pipeline, stage and attempt to it, and must stay DNS labels."""

RESERVED_ENV = sorted(Env)
"""Environment names that the operator sets, so a template may not."""

_IMMUTABLE = ("mode", "model", "train", "batch", "partition", "template", "gpu", "placement", "network")


def _immutable(field: str) -> dict[str, str]:
    return rule(
        f".{field}",
        f"has(self.{field}) == has(oldSelf.{field}) && (!has(self.{field}) || self.{field} == oldSelf.{field})",
        "'cannot change after creation; delete the job and create it anew'",
        "FieldValueForbidden",
    )


_UNFIT = f"self.stages < 1 || self.stages > {MAX_STAGES} || self.pipelines < 1 || self.pipelines > {MAX_PIPELINES}"
"""Numbers that the schema refuses by itself: rules about them would only repeat that, or divide by zero."""

_UNTRAINED = f"!has(self.train) || self.train.microbatches < 1 || {_UNFIT}"
"""The same for rules about training; another mode has none."""

_CHUNKS = "(has(self.train) ? self.train.schedule.chunksPerStage : 1)"


def _microbatches(schedules: str, holds: str, message: str, *values: str) -> dict[str, str]:
    """Say what a schedule demands of the microbatches of one pipeline; ``values`` are those in the message."""
    share = "(self.train.microbatches / self.pipelines)"
    return rule(
        ".train.microbatches",
        f"{_UNTRAINED} || self.train.microbatches % self.pipelines != 0 || "
        f"!(self.train.schedule.name in {schedules}) || {holds.format(share=share)}",
        f"'%d %s{message}'.format([{share}, self.pipelines == 1 ? '' : 'a pipeline ', {', '.join(values)}])",
    )


class EnvVar(Wire):
    """An environment variable of a container; all other members are kept as they are."""

    model_config = ConfigDict(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})

    name: str = Field(max_length=256)


class Container(Wire):
    """A container of the template; members not named here are kept as they are."""

    model_config = ConfigDict(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})

    name: str = Field(max_length=63)
    env: list[EnvVar] = Field([], max_length=128, json_schema_extra={"x-kubernetes-list-type": "atomic"})


class PodSpec(Wire):
    """The pod spec of the template; members not named here are kept as they are."""

    model_config = ConfigDict(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})

    containers: list[Container] = Field([], max_length=16, json_schema_extra={"x-kubernetes-list-type": "atomic"})


class Template(Wire):
    """A PodTemplateSpec."""

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-preserve-unknown-fields": True,
            **cel(
                rule(
                    ".spec.containers",
                    "!has(self.spec) || !has(self.spec.containers) || self.spec.containers.all(c, !has(c.env) || "
                    f"c.env.all(e, !(e.name in {[str(name) for name in RESERVED_ENV]!r})))",
                    "'environment name %s is set by the operator; allowed: any name but %s'.format(["
                    "self.spec.containers.map(c, has(c.env) ? c.env.map(e, e.name) : []).map(names, names.filter(n, "
                    f"n in {[str(name) for name in RESERVED_ENV]!r})).filter(names, size(names) > 0)[0][0], "
                    f"'{', '.join(RESERVED_ENV)}'])",
                )
            ),
        }
    )

    spec: PodSpec | None = Field(None, description="Pod spec; the container named worker is the stage.")


class Gpu(Wire):
    """The accelerator of each stage."""

    resource_name: str = Field(
        "nvidia.com/gpu", min_length=1, max_length=316, description="Extended resource that a stage asks for."
    )
    count: int = Field(1, ge=0, le=16, description="How many of it a stage asks for; 0 asks for none.")


class Spec(Wire):
    """What the user wants."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            rule(
                ".pipelines",
                f"{_UNFIT} || self.stages * self.pipelines <= {MAX_PODS}",
                "'%d pipelines of %d stages are %d pods; allowed: at most "
                f"{MAX_PODS}'.format([self.pipelines, self.stages, self.stages * self.pipelines])",
            ),
            rule(
                ".train.microbatches",
                f"{_UNTRAINED} || self.train.microbatches % self.pipelines == 0",
                "'%d cannot be shared equally by %d pipelines; allowed: a multiple of it'"
                ".format([self.train.microbatches, self.pipelines])",
            ),
            _microbatches(
                "['1F1B']",
                "{share} >= self.stages",
                "is too few for schedule 1F1B on %d stages; allowed: %d or more, or schedule GPipe",
                "self.stages",
                "self.stages",
            ),
            _microbatches(
                "['DualPipeV']",
                "{share} >= 2 * self.stages",
                "is too few for schedule DualPipeV on %d stages; allowed: %d or more, twice the stages, or schedule "
                "ZBVZeroBubble",
                "self.stages",
                "2 * self.stages",
            ),
            _microbatches(
                "['Interleaved1F1B', 'InterleavedZeroBubble']",
                "{share} % self.stages == 0",
                "is not a multiple of the %d stages, which schedule %s visits in rounds; allowed: a multiple, or "
                "schedule LoopedBFS",
                "self.stages",
                "self.train.schedule.name",
            ),
            rule(
                ".partition.boundaries",
                f"{_UNFIT} || self.partition.strategy != 'Manual' || !has(self.partition.boundaries) || "
                f"size(self.partition.boundaries) == self.stages * {_CHUNKS} - 1",
                "'%d boundaries do not cut the model into %d stages of %d chunks; allowed: %d'.format(["
                f"size(self.partition.boundaries), self.stages, {_CHUNKS}, self.stages * {_CHUNKS} - 1])",
            ),
            rule(
                ".train.data.tokenizerPath",
                "!has(self.train) || self.train.data.tokenizer != 'HuggingFace' || has(self.model.huggingFace) || "
                "(has(self.train.data.tokenizerPath) && self.train.data.tokenizerPath != '')",
                "'tokenizer HuggingFace needs a directory with tokenizer.json; allowed: its path, or none with "
                "model.huggingFace, which has one, or tokenizer Bytes'",
                "FieldValueRequired",
            ),
            *section_rules(),
            rule(
                ".stages",
                "!has(self.elasticity) || !has(self.elasticity.minStages) || self.stages >= self.elasticity.minStages",
                "'%d is less than elasticity.minStages %d; allowed: at least that'"
                ".format([self.stages, self.elasticity.minStages])",
            ),
            rule(
                ".stages",
                "!has(self.elasticity) || !has(self.elasticity.maxStages) || self.stages <= self.elasticity.maxStages",
                "'%d is more than elasticity.maxStages %d; allowed: at most that'"
                ".format([self.stages, self.elasticity.maxStages])",
            ),
            *(_immutable(field) for field in _IMMUTABLE),
        )
    )

    mode: Mode = Field(
        "Train",
        description="What the pipeline does: Train makes steps, Serve answers clients until it is deleted, Batch "
        "answers a file of requests. The section of the mode must be there, and no other.",
    )
    stages: int = Field(ge=1, le=MAX_STAGES, description="Number of pipeline stages, one pod each.")
    pipelines: int = Field(
        1,
        ge=1,
        le=MAX_PIPELINES,
        description="Copies of the pipeline: each trains its share of a step's microbatches, or serves its share of "
        "the requests.",
    )
    model: Model = Field(description="The model, from exactly one source.")
    partition: Partition = Field(default_factory=Partition, description="Which layers each stage holds.")
    train: Train | None = Field(None, description="How to train.")
    serve: Serve | None = Field(None, description="How to serve the model to clients.")
    batch: Batch | None = Field(None, description="How to answer a file of requests.")
    template: Template | None = Field(
        None,
        description="PodTemplateSpec of the stage pods. The container named worker is the stage: its image, resources "
        "and mounts may be set; with a command of its own it runs that instead of our worker. All else is yours.",
    )
    gpu: Gpu = Field(default_factory=Gpu, description="The accelerator of each stage.")
    placement: Placement = Field(default_factory=Placement, description="Where the stages run.")
    network: Network = Field(default_factory=Network, description="How the stages talk.")
    checkpoint: Checkpoint = Field(default_factory=Checkpoint, description="Where and how often the state is saved.")
    recovery: Recovery = Field(default_factory=Recovery, description="What happens when a stage fails.")
    elasticity: Elasticity = Field(default_factory=Elasticity, description="Between how many stages it may have.")
    suspend: bool = Field(
        False,
        description="True: the stages finish their step, save a checkpoint where a volume is set, and leave.",
    )
    active_deadline_seconds: int | None = Field(
        None,
        ge=1,
        le=315360000,
        description="The job fails when it has been active for longer; suspended time excluded.",
    )
    ttl_seconds_after_finished: int | None = Field(
        None, ge=0, le=315360000, description="The job is deleted this long after it has finished."
    )
    pod_cleanup_policy: Literal["Running", "All", "None"] = Field(
        "Running",
        description="Which pods are deleted when the job has finished: those still running, all, or none.",
    )


class PipelineJob(Wire):
    """A pipeline-parallel job: the operator cuts the model into stages and runs one pod for each."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            rule(
                ".metadata.name",
                f"size(self.metadata.name) <= {MAX_NAME} && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
                f"'%s cannot name the pods; allowed: at most {MAX_NAME} characters of a-z, 0-9 and -, a "
                "letter first'.format([self.metadata.name])",
            )
        )
    )

    api_version: Literal["pipelinejob.dev/v1alpha1"] = API_VERSION  # type: ignore[assignment]
    kind: Literal["PipelineJob"] = KIND  # type: ignore[assignment]
    metadata: dict[str, Any]
    spec: Spec
    status: Status = Field(default_factory=Status)


PRINTER_COLUMNS: tuple[tuple[str, str, str, int], ...] = (
    # name, JSON path, type, priority (1: only with -o wide)
    ("Mode", ".spec.mode", "string", 0),
    ("Stages", ".status.summary.stages", "string", 0),
    ("State", ".status.summary.state", "string", 0),
    ("Step", ".status.summary.step", "string", 0),
    ("Progress", ".status.summary.progress", "string", 0),
    ("Loss", ".status.summary.loss", "string", 0),
    ("Tokens/s", ".status.summary.tokensPerSecond", "string", 0),
    ("Bubble", ".status.summary.bubble", "string", 0),
    ("Requests/s", ".status.summary.requestsPerSecond", "string", 0),
    ("Queue", ".status.summary.queue", "string", 0),
    ("Restarts", ".status.restarts", "integer", 0),
    ("Age", ".metadata.creationTimestamp", "date", 0),
    ("Checkpoint", ".status.progress.lastCheckpointStep", "integer", 1),
    ("Fronts", ".status.summary.fronts", "string", 1),
    ("Schedule", ".spec.train.schedule.name", "string", 1),
    ("Bubble-Limit", ".status.summary.bubbleLimit", "string", 1),
    ("MFU", ".status.summary.modelFlops", "string", 1),
    ("Crossings", ".status.summary.crossings", "string", 1),
    ("Reason", '.status.conditions[?(@.type=="Running")].reason', "string", 1),
)
