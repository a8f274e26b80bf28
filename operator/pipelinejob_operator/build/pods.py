"""The pod of one stage: the user's template with the operator's parts merged in.

Where both say something, the user wins, except for what makes a pod a stage of this job (name, labels,
environment, volumes). What the user leaves out satisfies the restricted pod security standard. Requests for
CPU and memory are the user's or the namespace's LimitRange's to set: the operator cannot know what a model
needs.
"""

import copy
from collections.abc import Sequence
from typing import Any

from pipelinejob_operator.build import environment, security, wiring
from pipelinejob_operator.build.delegation import KUEUE_QUEUE, Delegate, join
from pipelinejob_operator.build.installation import Installation
from pipelinejob_operator.build.job import Job
from pipelinejob_operator.build.names import (
    CONFIG_ANNOTATION,
    GATE,
    MEMBERSHIP_ANNOTATION,
    REPLACEMENT_LABEL,
    network_name,
    pod_name,
    spare_labels,
    spare_name,
    stage_labels,
)
from pipelinejob_operator.build.place import Place
from pipelinejob_operator.build.volumes import recovery_volume, stage_volumes
from pipelinejob_operator.placement.affinity import (
    FALLBACK_LEVELS,
    HOST_LEVEL,
    avoid,
    elsewhere,
    near_neighbours,
    near_stages,
    together,
)
from pipelinejob_operator.policy.avoidance import avoided
from pipelinejob_worker.protocol import STATUS_PORT, WORKER_CONTAINER, ExitCode

AGENT_COMMAND = ["python3", "-m", "pipelinejob_worker.agent"]
GRACE_SECONDS = 30
NODE_LOSS_SECONDS = 30
"""How long a pod stays bound to a node that does not answer; 300 s, the default, hold up the gang."""

NOT_IN_PLACE = sorted({*(code for code in ExitCode if code.final), ExitCode.PEER_LOST, ExitCode.DRAINED})
"""Exit codes after which another start of the same container is pointless: all that an agent chooses by itself."""

IN_PLACE: dict[str, Any] = {
    "restartPolicy": "Never",
    "restartPolicyRules": [
        {
            "action": "RestartAllContainers",
            "exitCodes": {"operator": "NotIn", "values": [int(code) for code in NOT_IN_PLACE]},
        }
    ],
}
"""The kubelet starts the pod's containers again in place, its node and its memory kept. An API server that does not
know this drops it, or refuses it: then ``without_restart_in_place`` is created instead, and a container's end is the
pod's.
"""


def stage_pod(
    job: Job,
    place: Place,
    installation: Installation,
    *,
    share_host: bool,
    delegate: Delegate | None = None,
    replacement: int = 0,
) -> dict[str, Any]:
    """Build the pod of the stage at ``place`` in the present attempt.

    ``share_host`` keeps all stages on one node; ``delegate`` is the scheduler that places them, if it is not us;
    ``replacement``: which pod of that place it is.
    """
    name = pod_name(job.name, place, job.status.attempt, replacement)
    labels = stage_labels(job.name, job.uid, place, job.status.attempt)
    if job.recovers:
        labels[REPLACEMENT_LABEL] = str(replacement)
    pod = _pod(job, name, labels, installation, environment.fixed(job, place))
    spec = pod["spec"]
    spec["schedulingGates"] = [*spec.get("schedulingGates", []), {"name": GATE}]
    _place(spec, job, labels, installation, share_host=share_host, delegate=delegate)
    if delegate:
        join(pod, job, place, delegate)
    return pod


def spare_pod(job: Job, index: int, number: int, installation: Installation, *, share_host: bool) -> dict[str, Any]:
    """Build a spare pod, which can take over any stage; where it can it stands near them, on a node without one."""
    labels = spare_labels(job.name, job.uid, index, job.status.attempt)
    pod = _pod(job, spare_name(job.name, index, number), labels, installation, environment.spare(job, index))
    if share_host:
        _attract(pod["spec"], [], [together(labels, HOST_LEVEL)])
    else:
        rules = pod["spec"].setdefault("affinity", {}).setdefault("podAntiAffinity", {})
        key = "preferredDuringSchedulingIgnoredDuringExecution"
        rules[key] = [*rules.get(key, []), elsewhere(labels)]
        _attract(pod["spec"], near_stages(labels, job.shape.size, _levels(job, installation)), [])
    return pod


def _pod(
    job: Job, name: str, labels: dict[str, str], installation: Installation, variables: environment.Variables
) -> dict[str, Any]:
    """Build what all pods of a job have in common."""
    user_meta = job.template.get("metadata") or {}
    spec: dict[str, Any] = copy.deepcopy(job.template.get("spec") or {})
    volumes, mounts = stage_volumes(job.claim_name, read_only=job.source is not None)
    if job.recovers:
        volume, mount = recovery_volume(job.snapshot_memory_bytes)
        volumes, mounts = [*volumes, volume], [*mounts, mount]

    others = [item for item in spec.get("containers", []) if item.get("name") != WORKER_CONTAINER]
    spec["containers"] = [_worker(job, variables, installation, mounts), *others]
    spec["volumes"] = [*spec.get("volumes", []), *_unshadowed(volumes, mounts, spec["containers"][0])]
    spec["hostname"] = name
    spec["subdomain"] = network_name(job.name)
    spec["restartPolicy"] = "Never"
    spec["securityContext"] = security.pod() | (spec.get("securityContext") or {})
    spec["tolerations"] = tolerations(spec.get("tolerations", []))
    spec.setdefault("terminationGracePeriodSeconds", GRACE_SECONDS)
    spec.setdefault("automountServiceAccountToken", False)
    spec.setdefault("enableServiceLinks", False)
    wiring.wire(spec, spec["containers"][0], job.spec.network)
    avoid(spec, avoided(job.status.avoided_nodes))
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": job.namespace,
            "labels": (user_meta.get("labels") or {}) | labels,
            "annotations": wiring.annotations(job.spec.network)
            | (user_meta.get("annotations") or {})
            | {MEMBERSHIP_ANNOTATION: "", CONFIG_ANNOTATION: job.config().to_json()},
            "ownerReferences": [job.owner_reference()],
        },
        "spec": spec,
    }


def _worker(
    job: Job, variables: environment.Variables, installation: Installation, mounts: list[dict[str, Any]]
) -> dict[str, Any]:
    worker: dict[str, Any] = copy.deepcopy(job.worker_template)
    worker["name"] = WORKER_CONTAINER
    worker.setdefault("image", installation.worker_image)
    worker.setdefault("imagePullPolicy", installation.worker_image_pull_policy)
    worker.setdefault("terminationMessagePolicy", "FallbackToLogsOnError")
    if job.runs_agent:
        worker["command"] = AGENT_COMMAND
        worker["ports"] = [*worker.get("ports", []), {"name": "stage-status", "containerPort": STATUS_PORT}]
        worker["readinessProbe"] = {"httpGet": {"path": "/readyz", "port": STATUS_PORT}, "periodSeconds": 2}
    worker["env"] = [*environment.replaceable(job), *worker.get("env", []), *variables]
    if job.recovers and "restartPolicy" not in worker:
        worker |= IN_PLACE
    taken = {mount.get("mountPath", "").rstrip("/") for mount in worker.get("volumeMounts", [])}
    free = [mount for mount in mounts if mount["mountPath"] not in taken]
    worker["volumeMounts"] = [*worker.get("volumeMounts", []), *free]
    worker["securityContext"] = security.container(worker.get("securityContext") or {})
    if job.spec.gpu.count:
        # For an extended resource the API demands that the request equals the limit.
        resources = worker.setdefault("resources", {})
        for kind in ("requests", "limits"):
            resources[kind] = (resources.get(kind) or {}) | {job.spec.gpu.resource_name: str(job.spec.gpu.count)}
    return worker


def without_restart_in_place(pod: dict[str, Any]) -> dict[str, Any] | None:
    """Return the same pod for an API server that refuses ``IN_PLACE``; None where it has none of that."""
    containers = pod["spec"]["containers"]
    if not any(item.get("restartPolicyRules") == IN_PLACE["restartPolicyRules"] for item in containers):
        return None
    plain = [{key: value for key, value in item.items() if key not in IN_PLACE} for item in containers]
    return pod | {"spec": pod["spec"] | {"containers": plain}}


def _unshadowed(
    volumes: list[dict[str, Any]], mounts: list[dict[str, Any]], worker: dict[str, Any]
) -> list[dict[str, Any]]:
    """Leave out the volumes whose mount path the user has given to a volume of their own."""
    used = {mount["name"] for mount in worker["volumeMounts"]}
    ours = {mount["name"] for mount in mounts}
    return [volume for volume in volumes if volume["name"] in used & ours]


def tolerations(given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to those of the template that a pod leaves a node that does not answer sooner than by default."""
    keys = {item.get("key") for item in given}
    ours = [
        {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": NODE_LOSS_SECONDS}
        for key in ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
    ]
    # A toleration without a key tolerates everything for ever: the user wants the pods to outlast their node.
    return given if None in keys else [*given, *(item for item in ours if item["key"] not in keys)]


def _place(
    spec: dict[str, Any],
    job: Job,
    labels: dict[str, str],
    installation: Installation,
    *,
    share_host: bool,
    delegate: Delegate | None,
) -> None:
    """Add the terms of a stage's placement."""
    preferred, required = near_neighbours(labels, job.spec.stages, _levels(job, installation)), []
    if share_host:
        required.append(together(labels, HOST_LEVEL))
    if delegate is KUEUE_QUEUE:
        preferred = []  # at most 8 different pod specs make a pod group, and Kueue orders the ranks by itself
    elif delegate and job.spec.placement.required_level:
        required.append(together(labels, job.spec.placement.required_level))
    _attract(spec, preferred, required)


def _levels(job: Job, installation: Installation) -> Sequence[str]:
    """The levels of the topology, as far as they are known without a look at the nodes."""
    return job.spec.placement.topology_levels or installation.topology_levels or FALLBACK_LEVELS


def _attract(spec: dict[str, Any], preferred: list[dict[str, Any]], required: list[dict[str, Any]]) -> None:
    """Add terms to the user's own affinity."""
    if not preferred and not required:
        return
    rules = spec.setdefault("affinity", {}).setdefault("podAffinity", {})
    for key, terms in (
        ("preferredDuringSchedulingIgnoredDuringExecution", preferred),
        ("requiredDuringSchedulingIgnoredDuringExecution", required),
    ):
        if terms:
            rules[key] = [*rules.get(key, []), *terms]
