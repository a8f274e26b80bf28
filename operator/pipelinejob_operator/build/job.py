"""A PipelineJob as builders and controller use it: the parsed models, and the template as written."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipelinejob_operator.api.status import Status
from pipelinejob_operator.api.v1alpha1 import API_VERSION, KIND, Spec
from pipelinejob_operator.build.place import Shape
from pipelinejob_worker.protocol import WORKER_CONTAINER, WorkerConfig


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

    @property
    def shape(self) -> Shape:
        """Stages and pipelines that the spec asks for."""
        return Shape(self.spec.stages, self.spec.pipelines)

    @property
    def worker_template(self) -> dict[str, Any]:
        """The template's container of the stage, or an empty one."""
        containers: list[dict[str, Any]] = self.template.get("spec", {}).get("containers", [])
        return next((item for item in containers if item.get("name") == WORKER_CONTAINER), {})

    @property
    def runs_agent(self) -> bool:
        """Whether the stages run our agent: a command of the user's own replaces it."""
        return not self.worker_template.get("command")

    def config(self) -> WorkerConfig:
        """What every stage is told, unchanged between restarts."""
        return WorkerConfig.of(
            job=self.name,
            job_uid=self.uid,
            model=self.spec.model,
            train=self.spec.train,
            partition=self.spec.partition,
            checkpoint=self.spec.checkpoint,
        )

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
