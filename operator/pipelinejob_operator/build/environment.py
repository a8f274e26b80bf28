"""The environment of a stage: what a template may replace, and what it may not."""

from typing import Any

from pipelinejob_operator.build import wiring
from pipelinejob_operator.build.job import Job
from pipelinejob_operator.build.names import pod_host
from pipelinejob_operator.build.place import Place
from pipelinejob_worker.protocol import RENDEZVOUS_PORT, SCRATCH_DIRECTORY, Env

HUGGING_FACE_HOME = f"{SCRATCH_DIRECTORY}/huggingface"
"""Where the Hugging Face libraries keep what they download: the root file system is read-only."""

Variables = list[dict[str, Any]]


def replaceable(job: Job) -> Variables:
    """Variables that stand before the template's own, which win: of two with one name the last counts."""
    values = dict(wiring.DEFAULTS)
    if job.model.hugging_face is not None:
        values |= {"HF_HOME": HUGGING_FACE_HOME, "HF_HUB_DISABLE_TELEMETRY": "1"}
        if not job.model.from_hub:
            values["HF_HUB_OFFLINE"] = "1"  # a file that the directory lacks is an error, not a reason to ask the hub
    return [{"name": name, "value": value} for name, value in values.items()]


def fixed(job: Job, place: Place) -> Variables:
    """Variables of the stage at ``place``; they stand after the template's own."""
    attempt = job.status.attempt
    values: dict[Env, str] = {
        Env.RANK: str(place.rank),
        Env.WORLD_SIZE: str(place.shape.size),
        Env.LOCAL_RANK: "0",
        Env.MASTER_ADDR: pod_host(job.name, job.namespace, place.shape.places()[0], attempt),
        Env.MASTER_PORT: str(RENDEZVOUS_PORT),
        Env.PIPELINE_STAGE: str(place.stage),
        Env.PIPELINE_STAGES: str(place.shape.stages),
        Env.PIPELINE_INDEX: str(place.pipeline),
        Env.PIPELINE_COUNT: str(place.shape.pipelines),
        # Another number of threads sums in another order and gives other bits, so it must not follow the CPU
        # limit.
        Env.THREADS: "1",
        Env.JOB: job.name,
        Env.JOB_UID: job.uid,
        Env.ATTEMPT: str(attempt),
    }
    return _variables(job, values)


def spare(job: Job, index: int) -> Variables:
    """Variables of a spare pod, which learns its stage from its membership."""
    values = {
        Env.LOCAL_RANK: "0",
        Env.THREADS: "1",
        Env.JOB: job.name,
        Env.JOB_UID: job.uid,
        Env.ATTEMPT: str(job.status.attempt),
        Env.SPARE: str(index),
    }
    return _variables(job, values)


def _variables(job: Job, values: dict[Env, str]) -> Variables:
    """Add what every pod of the job has."""
    fields = {Env.POD_IP: "status.podIP", Env.NODE: "spec.nodeName"}
    return [
        *({"name": str(name), "value": value} for name, value in values.items()),
        *({"name": str(name), "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in fields.items()),
        *({"name": name, "value": value} for name, value in wiring.variables(job.spec.network).items()),
    ]
