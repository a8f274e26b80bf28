"""Which checkpoint a job serves: that of another job in its namespace, if it has one that can be served."""

from pydantic import ValidationError

from pipelinejob_operator.build.job import Job
from pipelinejob_operator.build.source import SourceJob
from pipelinejob_operator.policy.facts import Manifest
from pipelinejob_operator.policy.reasons import Reason, Verdict


def find(job: Job, manifest: Manifest | None) -> SourceJob | Verdict | None:
    """Read the job that ``spec.model.fromJob`` names, or say why its model cannot be served; None: it names none."""
    wanted = job.spec.model.from_job
    if wanted is None:
        return None
    field = f'spec.model.fromJob.name: PipelineJob "{wanted.name}"'
    if manifest is None:
        return Verdict(
            Reason.MODEL_JOB_NOT_FOUND,
            f'{field} does not exist in namespace "{job.namespace}"; create it (this job looks again by itself), or '
            "delete this job and name another one",
        )
    try:
        found = _read(Job.read(manifest))
    except ValidationError:
        found = "cannot be read; allowed: a job that is accepted, see its condition Accepted"
    if isinstance(found, str):
        return Verdict(Reason.MODEL_JOB_UNFIT, f"{field} {found}; delete this job and name another one")
    if found.checkpoint_step < max(1, wanted.step):
        which = f"of step {wanted.step} yet, the newest is of {found.checkpoint_step}" if wanted.step else "yet"
        return Verdict(
            Reason.MODEL_NOT_SAVED,
            f"{field} has no complete checkpoint {which}; this job starts by itself when it has",
        )
    return found


def _read(other: Job) -> SourceJob | str:
    """Read a job, or say why no other job can serve its model."""
    spec = other.spec
    if spec.train is None:
        return f"has mode {spec.mode}; allowed: a job of mode Train"
    if not spec.checkpoint.volume_claim_name:
        return "keeps its weights nowhere; allowed: a job with spec.checkpoint.volumeClaimName"
    if spec.model.module:
        return (
            "trains a model from a function, which has no place for a key-value cache; allowed: one of model.preset or "
            "model.huggingFace"
        )
    return SourceJob.of(other.name, spec, spec.train, other.status.progress.last_checkpoint_step)
