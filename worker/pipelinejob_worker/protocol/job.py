"""What the operator hands to every stage of a job, unchanged between restarts."""

from pydantic import Field

from pipelinejob_worker.protocol.base import Wire
from pipelinejob_worker.protocol.environment import PROTOCOL_VERSION
from pipelinejob_worker.protocol.model import Model, Partition
from pipelinejob_worker.protocol.recovery import RECOVERY_SINCE, Recovery
from pipelinejob_worker.protocol.serve import SERVING_SINCE, Batch, Engine, Mode, Source, Tokenizer
from pipelinejob_worker.protocol.train import Train

_RECREATE_ALL = Recovery()


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
    """What to train and where to save it, or what to serve; ``mode`` names the section that is set.

    ``oldest_reader`` is the oldest version whose workers know all that this job uses: a feature that is newer must
    raise it, or an older image would train without the feature and say nothing.
    """

    protocol_version: int = PROTOCOL_VERSION
    oldest_reader: int = 1
    job: str
    job_uid: str
    model: Model
    mode: Mode = Field("Train", description="Since protocol 4.")
    train: Train | None = Field(None, description="With mode Train, which is all that protocol 3 knows.")
    serve: Engine | None = Field(None, description="With mode Serve; since protocol 4.")
    batch: Batch | None = Field(None, description="With mode Batch; since protocol 4.")
    source: Source | None = Field(
        None, description="Whose weights are served, if not those that the model's source has; since protocol 4."
    )
    tokenizer: Tokenizer | None = Field(None, description="With the modes Serve and Batch; since protocol 4.")
    partition: Partition = Field(default_factory=Partition)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    recovery: Recovery = Field(default_factory=Recovery, description="Since protocol 4.")

    @classmethod
    def of(
        cls,
        *,
        job: str,
        job_uid: str,
        model: Model,
        mode: Mode = "Train",
        train: Train | None = None,
        serve: Engine | None = None,
        batch: Batch | None = None,
        source: Source | None = None,
        tokenizer: Tokenizer | None = None,
        partition: Partition,
        checkpoint: Checkpoint,
        recovery: Recovery = _RECREATE_ALL,
    ) -> "WorkerConfig":
        """Build the configuration with the oldest reader that its features allow."""
        config = cls(
            job=job,
            job_uid=job_uid,
            model=model,
            mode=mode,
            train=train,
            serve=serve,
            batch=batch,
            source=source,
            tokenizer=tokenizer,
            partition=partition,
            checkpoint=checkpoint,
            recovery=recovery,
        )
        return config.model_copy(update={"oldest_reader": _oldest_reader(config)})

    @property
    def training(self) -> Train:
        """How to train, in mode Train."""
        if self.train is None:
            raise ValueError(f"spec.mode: {self.mode} does not train; allowed: Train")
        return self.train

    @property
    def engine(self) -> Engine:
        """How a pipeline computes in the modes Serve and Batch."""
        engine = self.serve or self.batch
        if engine is None:
            raise ValueError(f"spec.mode: {self.mode} does not serve; allowed: Serve or Batch")
        return engine


def _oldest_reader(config: WorkerConfig) -> int:
    if config.mode != "Train":
        return SERVING_SINCE
    if config.recovery.strategy == "Ladder":
        return RECOVERY_SINCE
    return 1 if _is_version_2(config) else 3


def _is_version_2(config: WorkerConfig) -> bool:
    """Whether workers of protocol 2 know all that the job trains with: everything since then is at its default."""
    used = config.model_dump(exclude_defaults=True, exclude={"protocol_version", "recovery"})
    return _paths(used) <= _VERSION_2 and config.training.schedule.name in ("GPipe", "1F1B")


def _paths(value: object, path: str = "") -> set[str]:
    if not isinstance(value, dict):
        return {path}
    return {found for name, item in value.items() for found in _paths(item, f"{path}.{name}" if path else name)}


_VERSION_2 = frozenset(
    [
        "job",
        "job_uid",
        *(f"model.preset.{name}" for name in ("name", "layers", "width", "heads", "context", "dropout")),
        *(f"train.{name}" for name in ("data.files", "steps", "global_batch_size", "microbatches", "seed")),
        *(f"train.optimizer.{name}" for name in ("learning_rate", "weight_decay", "clip_norm")),
        "train.schedule.name",
        *(f"checkpoint.{name}" for name in ("volume_claim_name", "every_steps", "keep")),
    ]
)
