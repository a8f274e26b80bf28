"""Names, labels and annotations of the job's objects: how the operator finds again what it made."""

from pipelinejob_operator.api.v1alpha1 import GROUP
from pipelinejob_operator.build.place import Place

MANAGED_BY_LABEL = "app.kubernetes.io/managed-by"
MANAGED_BY = "pipelinejob-operator"
JOB_LABEL = f"{GROUP}/job"
JOB_UID_LABEL = f"{GROUP}/job-uid"
STAGE_LABEL = f"{GROUP}/stage"
STAGES_LABEL = f"{GROUP}/stages"
PIPELINE_LABEL = f"{GROUP}/pipeline"
PIPELINES_LABEL = f"{GROUP}/pipelines"
ATTEMPT_LABEL = f"{GROUP}/attempt"
FRONT_LABEL = f"{GROUP}/front"
"""Of the fronts' pods: the job's UID. They have no stage."""
SERVICE_LABEL = f"{GROUP}/service"
"""Of the fronts' pods, and of the Service itself: the Service that several jobs share."""
REPLACEMENT_LABEL = f"{GROUP}/replacement"
"""Which pod of its place within the attempt; only pods whose agents recover by themselves have it."""
SPARE_LABEL = f"{GROUP}/spare"
"""Index of a spare pod, which has no stage; taken away when it takes one over."""
MEMBERSHIP_ANNOTATION = f"{GROUP}/membership"
CONFIG_ANNOTATION = f"{GROUP}/config"
OPENED_ANNOTATION = f"{GROUP}/opened"
GATE = f"{GROUP}/gang"
FIELD_MANAGER = "pipelinejob-operator"


def pod_name(job: str, place: Place, attempt: int, replacement: int = 0) -> str:
    """Name of a stage pod; numbered, so that a replacement never waits for a dead node's pod."""
    pipeline = f"-p{place.pipeline}" if place.shape.pipelines > 1 else ""
    return f"{job}{pipeline}-s{place.stage}-a{attempt}" + (f"-r{replacement}" if replacement else "")


def spare_name(job: str, index: int, number: int) -> str:
    """Name of a spare pod; numbered, because the one before may have become a stage and lives on."""
    return f"{job}-spare-{index}-a{number}"


def gang_name(job: str, attempt: int) -> str:
    """Name of the gang of one attempt, where a scheduler must tell it from the one before."""
    return f"{job}-a{attempt}"


def network_name(job: str) -> str:
    """Name of the headless Service and of the NetworkPolicy: the job's own."""
    return job


def front_name(job: str) -> str:
    """Name of the fronts' Deployment, Service and whatever else belongs to them."""
    return f"{job}-front"


def engine_name(job: str, pipeline: int) -> str:
    """Name of the Service at which fronts find stage 0 of a pipeline."""
    return f"{job}-engine-{pipeline}"


def pod_host(job: str, namespace: str, place: Place, attempt: int) -> str:
    """DNS name of a stage pod; it resolves before the pod is ready."""
    return f"{pod_name(job, place, attempt)}.{network_name(job)}.{namespace}.svc"


def job_labels(job: str, uid: str) -> dict[str, str]:
    """Labels that every object of a job carries. The UID tells a job from a deleted one of the same name."""
    return {MANAGED_BY_LABEL: MANAGED_BY, JOB_LABEL: job, JOB_UID_LABEL: uid}


def stage_labels(job: str, uid: str, place: Place, attempt: int) -> dict[str, str]:
    """Labels of a stage pod."""
    return {
        **job_labels(job, uid),
        STAGE_LABEL: str(place.stage),
        STAGES_LABEL: str(place.shape.stages),
        PIPELINE_LABEL: str(place.pipeline),
        PIPELINES_LABEL: str(place.shape.pipelines),
        ATTEMPT_LABEL: str(attempt),
    }


def front_labels(job: str, uid: str, service: str = "") -> dict[str, str]:
    """Labels of a front's pod. ``service``: what the job shares with others."""
    return {**job_labels(job, uid), FRONT_LABEL: uid, **({SERVICE_LABEL: service} if service else {})}


def spare_labels(job: str, uid: str, index: int, attempt: int) -> dict[str, str]:
    """Labels of a spare pod."""
    return {**job_labels(job, uid), SPARE_LABEL: str(index), ATTEMPT_LABEL: str(attempt)}


def pod_selector(job: str) -> str:
    """Label selector of a job's stage pods, as ``status.selector`` shows it."""
    return f"{MANAGED_BY_LABEL}={MANAGED_BY},{JOB_LABEL}={job},{STAGE_LABEL}"
