"""Names, labels and annotations of the job's objects: how the operator finds again what it made."""

from pipelinejob_operator.api.v1alpha1 import GROUP

MANAGED_BY_LABEL = "app.kubernetes.io/managed-by"
MANAGED_BY = "pipelinejob-operator"
JOB_LABEL = f"{GROUP}/job"
JOB_UID_LABEL = f"{GROUP}/job-uid"
STAGE_LABEL = f"{GROUP}/stage"
STAGES_LABEL = f"{GROUP}/stages"
ATTEMPT_LABEL = f"{GROUP}/attempt"
MEMBERSHIP_ANNOTATION = f"{GROUP}/membership"
CONFIG_ANNOTATION = f"{GROUP}/config"
GATE = f"{GROUP}/gang"
FIELD_MANAGER = "pipelinejob-operator"


def pod_name(job: str, stage: int, attempt: int) -> str:
    """Name of a stage pod; with the attempt, so that a replacement never waits for a dead node's pod."""
    return f"{job}-s{stage}-a{attempt}"


def network_name(job: str) -> str:
    """Name of the headless Service and of the NetworkPolicy: the job's own."""
    return job


def pod_host(job: str, namespace: str, stage: int, attempt: int) -> str:
    """DNS name of a stage pod; it resolves before the pod is ready."""
    return f"{pod_name(job, stage, attempt)}.{network_name(job)}.{namespace}.svc"


def job_labels(job: str, uid: str) -> dict[str, str]:
    """Labels that every object of a job carries. The UID tells a job from a deleted one of the same name."""
    return {MANAGED_BY_LABEL: MANAGED_BY, JOB_LABEL: job, JOB_UID_LABEL: uid}


def stage_labels(job: str, uid: str, stage: int, stages: int, attempt: int) -> dict[str, str]:
    """Labels of a stage pod."""
    return {
        **job_labels(job, uid),
        STAGE_LABEL: str(stage),
        STAGES_LABEL: str(stages),
        ATTEMPT_LABEL: str(attempt),
    }


def pod_selector(job: str) -> str:
    """Label selector of a job's pods, as ``status.selector`` shows it."""
    return f"{MANAGED_BY_LABEL}={MANAGED_BY},{JOB_LABEL}={job}"
