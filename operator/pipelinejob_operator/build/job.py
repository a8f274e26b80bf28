"""A PipelineJob as builders and controller use it: the parsed models, and the template as written."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pipelinejob_operator.api.status import Status
from pipelinejob_operator.api.v1alpha1 import API_VERSION, KIND, Spec
from pipelinejob_operator.build.place import Shape
from pipelinejob_operator.build.source import SourceJob, own
from pipelinejob_operator.placement.quantity import amount
from pipelinejob_worker.protocol import WORKER_CONTAINER, Engine, Model, Source, Tokenizer, WorkerConfig
from pipelinejob_worker.protocol import Recovery as WorkerRecovery

MOST_RESTARTS = 1000
LONGEST_WINDOW_SECONDS = 2_592_000
"""What an agent counts at most; the operator's own budget is that of the API."""


@dataclass(frozen=True)
class Job:
    """One PipelineJob."""

    name: str
    namespace: str
    uid: str
    generation: int
    resource_version: str
    spec: Spec
    status: Status
    template: dict[str, Any]
    """``spec.template`` as the user wrote it: the models know only the parts that rules are about."""
    deleting: bool = False
    source: SourceJob | None = None
    """The job of ``spec.model.fromJob``, where it can be served."""

    @classmethod
    def read(cls, manifest: dict[str, Any]) -> "Job":
        """Read a manifest; raises pydantic's ValidationError where the spec breaks the models' rules."""
        return cls._with(manifest, Spec.model_validate(manifest["spec"]))

    @classmethod
    def read_header(cls, manifest: dict[str, Any]) -> "Job":
        """Read all but the spec, of which only the shape of the gang is kept: enough to refuse it."""
        construct: Callable[..., Spec] = Spec.model_construct
        spec = manifest.get("spec", {})
        stages, pipelines = (_count(spec.get(name, default)) for name, default in (("stages", 0), ("pipelines", 1)))
        return cls._with(manifest, construct(stages=stages, pipelines=pipelines))

    @classmethod
    def _with(cls, manifest: dict[str, Any], spec: Spec) -> "Job":
        meta = manifest["metadata"]
        return cls(
            name=meta["name"],
            namespace=meta["namespace"],
            uid=meta["uid"],
            generation=meta.get("generation", 0),
            resource_version=meta["resourceVersion"],
            spec=spec,
            status=Status.model_validate(manifest.get("status", {})),
            template=manifest.get("spec", {}).get("template") or {},
            deleting="deletionTimestamp" in meta,
        )

    def in_shape(self, shape: Shape) -> "Job":
        """Return the same job as if its spec asked for another number of stages and pipelines."""
        spec = self.spec.model_copy(update={"stages": shape.stages, "pipelines": shape.pipelines})
        return replace(self, spec=spec)

    @property
    def shape(self) -> Shape:
        """Stages and pipelines that the spec asks for."""
        return Shape(self.spec.stages, self.spec.pipelines)

    @property
    def model(self) -> Model:
        """The model itself: with ``fromJob``, that of the other job, if it is known."""
        return self.source.model if self.source else self.spec.model

    @property
    def claim_name(self) -> str:
        """The claim with checkpoints: the job's own, or that of the job whose model it serves; empty: none."""
        return self.source.claim_name if self.source else self.spec.checkpoint.volume_claim_name

    @property
    def tokenizer(self) -> Tokenizer | None:
        """How text becomes tokens in the modes Serve and Batch."""
        spec = self.spec
        if spec.mode == "Train":
            return None
        if spec.serve and spec.serve.tokenizer_path:
            return Tokenizer(name="HuggingFace", path=spec.serve.tokenizer_path)
        if self.source:
            return self.source.tokenizer
        return own(spec.model.hugging_face) if spec.model.hugging_face else Tokenizer(name="Bytes")

    @property
    def worker_template(self) -> dict[str, Any]:
        """The template's container of the stage, or an empty one."""
        containers: list[dict[str, Any]] = self.template.get("spec", {}).get("containers", [])
        return next((item for item in containers if item.get("name") == WORKER_CONTAINER), {})

    @property
    def runs_agent(self) -> bool:
        """Whether the stages run our agent: a command of the user's own replaces it."""
        return not self.worker_template.get("command")

    @property
    def recovers(self) -> bool:
        """Whether its agents recover single stages by themselves.

        Of replicas each has to live and die alone, so that a job of several is left to the operator.
        """
        alone = self.spec.mode == "Train" or self.spec.pipelines == 1
        return self.runs_agent and alone and self.spec.recovery.strategy == "Ladder"

    @property
    def rings(self) -> bool:
        """Whether equal stages of its pipelines exchange gradients: replicas that serve do not know of each other."""
        return self.spec.mode == "Train"

    @property
    def snapshot_memory_bytes(self) -> int:
        """Most memory that a stage's snapshots may take; 0: what the node has."""
        if self.spec.recovery.memory:
            return amount("memory", self.spec.recovery.memory)
        limit = (self.worker_template.get("resources") or {}).get("limits", {}).get("memory")
        return amount("memory", limit) // 2 if limit else 0

    def config(self) -> WorkerConfig:
        """What every stage is told, unchanged between restarts."""
        told = WorkerConfig.of(
            job=self.name,
            job_uid=self.uid,
            model=self.model,
            mode=self.spec.mode,
            train=self.spec.train,
            serve=Engine.model_validate(self.spec.serve.model_dump()) if self.spec.serve else None,
            batch=self.spec.batch,
            source=self._source(),
            tokenizer=self.tokenizer,
            partition=self.spec.partition,
            checkpoint=self.spec.checkpoint,
        )
        if not self.recovers:
            return told
        # The oldest reader stays that of the training: an older image, which an upgrade can leave in a template,
        # restarts as a gang, and the status says so; refusing the configuration would end such jobs.
        return told.model_copy(update={"recovery": self._recovery()})

    def _recovery(self) -> WorkerRecovery:
        """What the agents are told of recovery; their bounds are narrower than those of the API."""
        wanted = self.spec.recovery
        return WorkerRecovery(
            strategy=wanted.strategy,
            snapshot_every_steps=wanted.snapshot_every_steps,
            hang_timeout_seconds=wanted.hang_timeout_seconds,
            max_restarts=min(wanted.max_restarts, MOST_RESTARTS),
            window_seconds=min(wanted.window_seconds, LONGEST_WINDOW_SECONDS),
            memory_bytes=self.snapshot_memory_bytes,
        )

    def _source(self) -> Source | None:
        from_job = self.spec.model.from_job
        if from_job is None or self.source is None:
            return None
        return Source(job=self.source.name, seed=self.source.seed, step=from_job.step)

    def owner_reference(self) -> dict[str, Any]:
        """Make an object the job's own: the garbage collector deletes it with the job, operator or not."""
        return {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "name": self.name,
            "uid": self.uid,
            "controller": True,
            "blockOwnerDeletion": True,
        }


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0
