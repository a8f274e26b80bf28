"""The fronts of a Serve job: torch-free pods that answer clients, and how they reach the pipelines.

Fronts find stage 0 of each pipeline through a Service of its own, whose endpoints Kubernetes keeps: so a new pod is
reached without the operator. They run the worker's image with the template's volumes, because the tokenizer lies where
the stages have it, in the image or on a volume.
"""

import copy
from typing import Any

from pipelinejob_operator.api.serving import Serve
from pipelinejob_operator.build import security
from pipelinejob_operator.build.installation import Installation
from pipelinejob_operator.build.job import Job
from pipelinejob_operator.build.names import (
    FRONT_LABEL,
    JOB_UID_LABEL,
    PIPELINE_LABEL,
    SERVICE_LABEL,
    STAGE_LABEL,
    engine_name,
    front_labels,
    front_name,
    job_labels,
)
from pipelinejob_operator.build.pods import tolerations
from pipelinejob_worker.protocol import ENGINE_PORT, SCRATCH_DIRECTORY

FRONT_PORT = 8000
"""Where a front listens; the Service's port is the user's."""

ENGINES_DIRECTORY = "/etc/pipelinejob"
TOKEN_DIRECTORY = "/etc/pipelinejob-token"  # noqa: S105 - a directory
TOKEN_KEY = "token"  # noqa: S105 - the name of a key
FETCHED_DIRECTORY = "/model"
"""Where the tokenizer of a model from a hub is fetched to."""

LEAVE_SECONDS = 5
"""Between the end of a front's endpoints and SIGTERM: no new client comes then."""

CHECK_SECONDS = 2
START_SECONDS = 180
REQUESTS = {"cpu": "50m", "memory": "256Mi"}
LIMITS = {"memory": "2Gi"}

ENGINES, TOKEN, SCRATCH, FETCHED = (f"pipelinejob-{part}" for part in ("engines", "token", "scratch", "tokenizer"))

_FETCH = (
    "import sys; from huggingface_hub import snapshot_download as fetch; "
    "fetch(sys.argv[1], revision=sys.argv[2], local_dir=sys.argv[3], allow_patterns=sys.argv[4:])"
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")

Manifest = dict[str, Any]


def front_objects(job: Job, installation: Installation) -> list[Manifest]:
    """Every object that a Serve job has beside its stages, while it runs."""
    serve = job.spec.serve
    if serve is None:
        return []
    return [
        *(_engine_service(job, pipeline) for pipeline in range(job.spec.pipelines)),
        _engines(job),
        _service(job, serve),
        *([_shared_service(job, serve)] if serve.shared_service else []),
        *([_network_policy(job)] if job.spec.network.network_policy == "Enabled" else []),
        _disruption_budget(job),
        deployment(job, serve, installation, replicas=serve.fronts),
    ]


def deployment(job: Job, serve: Serve, installation: Installation, *, replicas: int) -> Manifest:
    """The fronts' pods, none (``replicas`` 0) of a job that does not run.

    One is replaced only when the next is ready, and has the time of its requests to end them.
    """
    labels = front_labels(job.name, job.uid, serve.shared_service)
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(job, front_name(job.name)),
        "spec": {
            "replicas": replicas,
            "revisionHistoryLimit": 1,
            "selector": {"matchLabels": {FRONT_LABEL: job.uid}},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "template": {"metadata": {"labels": labels}, "spec": _pod(job, serve, installation)},
        },
    }


def _pod(job: Job, serve: Serve, installation: Installation) -> Manifest:
    given = copy.deepcopy(job.template.get("spec") or {})
    fetches = job.model.from_hub and not (job.tokenizer and job.tokenizer.path)
    volumes, mounts = _volumes(job, serve, fetches=fetches)
    kept = {"imagePullSecrets": given["imagePullSecrets"]} if "imagePullSecrets" in given else {}
    spread = {
        "weight": 100,
        "podAffinityTerm": {
            "topologyKey": "kubernetes.io/hostname",
            "labelSelector": {"matchLabels": {FRONT_LABEL: job.uid}},
        },
    }
    return {
        **kept,
        "tolerations": tolerations(given.get("tolerations", [])),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": LEAVE_SECONDS + serve.limits.request_seconds + LEAVE_SECONDS,
        "securityContext": security.pod() | (given.get("securityContext") or {}),
        "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [spread]}},
        **({"initContainers": [_fetcher(job, installation)]} if fetches else {}),
        "containers": [_front(job, serve, installation, mounts)],
        "volumes": volumes,
    }


def _front(job: Job, serve: Serve, installation: Installation, mounts: list[Manifest]) -> Manifest:
    def probe(path: str, **rest: int) -> Manifest:
        return {"httpGet": {"path": path, "port": FRONT_PORT}, "periodSeconds": CHECK_SECONDS, **rest}

    return {
        "name": "front",
        **_image(job, installation),
        "command": ["python3", "-m", "pipelinejob_worker.front"],
        "env": [{"name": name, "value": value} for name, value in environment(job, serve).items()],
        "ports": [{"name": "http", "containerPort": FRONT_PORT}],
        "startupProbe": probe("/healthz", failureThreshold=START_SECONDS // CHECK_SECONDS),
        "livenessProbe": probe("/healthz", failureThreshold=10, timeoutSeconds=5),
        "readinessProbe": probe("/readyz", failureThreshold=2),
        "lifecycle": {"preStop": {"sleep": {"seconds": LEAVE_SECONDS}}},
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "resources": {"requests": dict(REQUESTS), "limits": dict(LIMITS)},
        "securityContext": security.container({}),
        "volumeMounts": mounts,
    }


def environment(job: Job, serve: Serve) -> dict[str, str]:
    """What a front is told; see its settings."""
    limits, tokenizer = serve.limits, job.tokenizer
    assert tokenizer is not None
    values = {
        "MODEL": serve.model_name or job.name,
        "PORT": FRONT_PORT,
        "ENGINES_FILE": f"{ENGINES_DIRECTORY}/engines",
        "TOKENIZER": tokenizer.name,
        "TOKENIZER_DIRECTORY": tokenizer.path or FETCHED_DIRECTORY,
        **({"BEARER_TOKEN_FILE": f"{TOKEN_DIRECTORY}/{TOKEN_KEY}"} if serve.bearer_token_secret_name else {}),
        "BODY_BYTES": limits.body_bytes,
        "PROMPT_TOKENS": limits.prompt_tokens,
        "OUTPUT_TOKENS": limits.output_tokens,
        "REQUESTS": limits.requests,
        "REQUEST_SECONDS": limits.request_seconds,
        "RECOVERY_SECONDS": limits.recovery_seconds,
        "DRAIN_SECONDS": min(limits.request_seconds, 3600),
    }
    return {f"PIPELINEJOB_FRONT_{name}": str(value) for name, value in values.items()}


def _fetcher(job: Job, installation: Installation) -> Manifest:
    """Fetch the tokenizer's files from the hub, with the template's own environment: it may hold an access token."""
    model = job.model.hugging_face
    assert model is not None
    settings = {"HF_HOME": f"{SCRATCH_DIRECTORY}/huggingface", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {
        "name": "tokenizer",
        **_image(job, installation),
        "command": ["python3", "-c", _FETCH, model.path, model.revision, FETCHED_DIRECTORY, *_TOKENIZER_FILES],
        "env": [
            *({"name": name, "value": value} for name, value in settings.items()),
            *job.worker_template.get("env", []),
        ],
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "resources": {"requests": dict(REQUESTS), "limits": dict(LIMITS)},
        "securityContext": security.container({}),
        "volumeMounts": [
            {"name": SCRATCH, "mountPath": SCRATCH_DIRECTORY},
            {"name": FETCHED, "mountPath": FETCHED_DIRECTORY},
        ],
    }


def _image(job: Job, installation: Installation) -> Manifest:
    worker = job.worker_template
    return {
        "image": worker.get("image", installation.worker_image),
        "imagePullPolicy": worker.get("imagePullPolicy", installation.worker_image_pull_policy),
    }


def _volumes(job: Job, serve: Serve, *, fetches: bool) -> tuple[list[Manifest], list[Manifest]]:
    """The fronts' own volumes, and what the template mounts into the worker, read-only."""
    volumes: list[Manifest] = [
        {"name": ENGINES, "configMap": {"name": front_name(job.name)}},
        {"name": SCRATCH, "emptyDir": {}},
    ]
    mounts: list[Manifest] = [
        {"name": ENGINES, "mountPath": ENGINES_DIRECTORY, "readOnly": True},
        {"name": SCRATCH, "mountPath": SCRATCH_DIRECTORY},
    ]
    if serve.bearer_token_secret_name:
        items = [{"key": TOKEN_KEY, "path": TOKEN_KEY}]
        volumes.append({"name": TOKEN, "secret": {"secretName": serve.bearer_token_secret_name, "items": items}})
        mounts.append({"name": TOKEN, "mountPath": TOKEN_DIRECTORY, "readOnly": True})
    if fetches:
        volumes.append({"name": FETCHED, "emptyDir": {}})
        mounts.append({"name": FETCHED, "mountPath": FETCHED_DIRECTORY, "readOnly": True})
    taken = {mount["mountPath"] for mount in mounts}
    theirs = [
        {**mount, "readOnly": True}
        for mount in job.worker_template.get("volumeMounts", [])
        if mount.get("mountPath", "").rstrip("/") not in taken
    ]
    used = {mount["name"] for mount in theirs}
    given = [volume for volume in (job.template.get("spec") or {}).get("volumes", []) if volume.get("name") in used]
    return [*volumes, *given], [*mounts, *theirs]


def _engine_service(job: Job, pipeline: int) -> Manifest:
    """Stage 0 of a pipeline, also before it is ready: a front that asks too early asks again."""
    selector = {JOB_UID_LABEL: job.uid, STAGE_LABEL: "0", PIPELINE_LABEL: str(pipeline)}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(job, engine_name(job.name, pipeline)),
        "spec": {
            "publishNotReadyAddresses": True,
            "selector": selector,
            "ports": [{"name": "engine", "port": ENGINE_PORT, "protocol": "TCP"}],
        },
    }


def _engines(job: Job) -> Manifest:
    lines = [
        f"{engine_name(job.name, pipeline)}.{job.namespace}.svc:{ENGINE_PORT}\n"
        for pipeline in range(job.spec.pipelines)
    ]
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(job, front_name(job.name)),
        "data": {"engines": "".join(lines)},
    }


def _shared_service(job: Job, serve: Serve) -> Manifest:
    """The Service of several jobs, none of which controls it: it goes with the last of its owners."""
    labels = {SERVICE_LABEL: serve.shared_service}
    metadata = {
        "name": serve.shared_service,
        "namespace": job.namespace,
        "labels": labels,
        "ownerReferences": [job.owner_reference() | {"controller": False, "blockOwnerDeletion": False}],
    }
    return _front_service(metadata, labels, serve.port, f"http-{serve.port}")


def _service(job: Job, serve: Serve) -> Manifest:
    return _front_service(_metadata(job, front_name(job.name)), {FRONT_LABEL: job.uid}, serve.port, "http")


def _front_service(metadata: Manifest, selector: dict[str, str], port: int, name: str) -> Manifest:
    ports = [{"name": name, "port": port, "targetPort": FRONT_PORT, "protocol": "TCP"}]
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {"selector": selector, "ports": ports}}


def _network_policy(job: Job) -> Manifest:
    """In from pods of the namespace, on the port of the API; out to stage 0, DNS and, for a hub, HTTPS anywhere.

    Whom else to let in is the user's to say: policies add up.
    """
    stages = {"podSelector": {"matchLabels": {JOB_UID_LABEL: job.uid, STAGE_LABEL: "0"}}}
    hub = [{"ports": [{"protocol": "TCP", "port": 443}]}] if job.model.from_hub else []
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(job, front_name(job.name)),
        "spec": {
            "podSelector": {"matchLabels": {FRONT_LABEL: job.uid}},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [{"podSelector": {}}], "ports": [{"protocol": "TCP", "port": FRONT_PORT}]}],
            "egress": [
                {"to": [stages], "ports": [{"protocol": "TCP", "port": ENGINE_PORT}]},
                {"ports": [{"protocol": protocol, "port": 53} for protocol in ("UDP", "TCP")]},
                *hub,
            ],
        },
    }


def _disruption_budget(job: Job) -> Manifest:
    """A drain of nodes takes one front at a time."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": _metadata(job, front_name(job.name)),
        "spec": {
            "maxUnavailable": 1,
            "selector": {"matchLabels": {FRONT_LABEL: job.uid}},
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
        },
    }


def _metadata(job: Job, name: str) -> Manifest:
    return {
        "name": name,
        "namespace": job.namespace,
        "labels": job_labels(job.name, job.uid),
        "ownerReferences": [job.owner_reference()],
    }
