"""Acceptance: what the CRD cannot refuse. Each check passes, or says why the job cannot run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipelinejob_operator.api.v1alpha1 import Spec
from pipelinejob_operator.build.names import GATE
from pipelinejob_operator.build.volumes import OUR_MOUNT_PATHS, OUR_VOLUMES
from pipelinejob_operator.build.wiring import NETWORKS_ANNOTATION
from pipelinejob_operator.policy.facts import Claim, Manifest
from pipelinejob_operator.policy.reasons import Reason, Verdict
from pipelinejob_worker.protocol import WORKER_CONTAINER, Model

EXTRA_MODULES = 2
"""The embedding before a preset's blocks and the head after them can be stages of their own."""

CONFIG_LIMIT_BYTES = 131_072
"""The worker's configuration travels in an annotation; all annotations of a pod may hold 262,144 bytes."""

OURS_ALONE = {
    "restartPolicy": "the operator restarts the whole gang",
    "hostname": "the pod's name is its host name",
    "subdomain": "the job's headless Service is the subdomain",
    "nodeName": "kube-scheduler chooses the node; use nodeSelector or affinity",
    "ephemeralContainers": "they can be added to running pods only",
}


@dataclass(frozen=True)
class Case:
    """What acceptance is decided on."""

    spec: Spec
    template: Manifest
    claim: Claim | None
    config_bytes: int
    source_model: Model | None = None
    """The model of the job in ``model.fromJob``."""
    known_layers: int = 0
    """Layers of a model that only its stages can count; 0 while they have not."""

    @property
    def model(self) -> Model:
        """The model itself."""
        return self.source_model or self.spec.model


def check(case: Case) -> Verdict | None:
    """Run the checks in order; the first that fails speaks. None means accepted."""
    return next((verdict for rule in CHAIN if (verdict := rule(case))), None)


def enough_layers(case: Case) -> Verdict | None:
    """Every chunk of every stage needs a layer; of other models than presets the stages tell how many there are."""
    preset, stages = case.model.preset, case.spec.stages
    chunks = case.spec.train.schedule.chunks_per_stage if case.spec.train else 1
    parts = preset.layers + EXTRA_MODULES if preset else case.known_layers
    if not parts or parts >= stages * chunks:
        return None
    wanted = f"{stages} stages" if chunks == 1 else f"{stages} stages of {chunks} chunks"
    most = parts // chunks
    allowed = f"at most {most} stages; lower spec.stages" if most else f"at most {parts} chunks; lower chunksPerStage"
    size = f"{preset.layers} layers (with embedding and head {parts} parts)" if preset else f"{parts} layers"
    more = ", or give spec.model.preset more layers" if preset else ""
    return Verdict(Reason.TOO_FEW_LAYERS, f"spec.stages: {wanted} for a model of {size}; allowed: {allowed}{more}")


def boundaries_lie_inside(case: Case) -> Verdict | None:
    """The last boundary must leave a layer to the last chunk; the order is checked by the API server."""
    preset, boundaries = case.model.preset, case.spec.partition.boundaries
    if preset is None or not boundaries or boundaries[-1] < preset.layers + EXTRA_MODULES:
        return None
    last = preset.layers + EXTRA_MODULES - 1
    return Verdict(
        Reason.INVALID_SPEC,
        f"spec.partition.boundaries: {boundaries[-1]} is past the last of {last + 1} parts (embedding, {preset.layers} "
        f"layers, head), counted from 0; allowed: 1 to {last}",
    )


def configuration_fits(case: Case) -> Verdict | None:
    """The worker's configuration must fit into an annotation."""
    if case.config_bytes <= CONFIG_LIMIT_BYTES:
        return None
    return Verdict(
        Reason.INVALID_SPEC,
        f"spec.train.data.files: model and train take {case.config_bytes} bytes as JSON; allowed: "
        f"{CONFIG_LIMIT_BYTES}; use fewer or shorter patterns",
    )


def template_leaves_ours_alone(case: Case) -> Verdict | None:
    """The template must not set what belongs to the operator."""
    problem = next(_template_problems(case.template.get("spec", {})), None)
    return Verdict(Reason.INVALID_TEMPLATE, f"spec.template.spec.{problem}") if problem else None


def _template_problems(pod: Manifest) -> Iterator[str]:
    for field, why in OURS_ALONE.items():
        if pod.get(field) and not (field == "restartPolicy" and pod[field] == "Never"):
            yield f"{field}: cannot be set, because {why}; remove it"
    names = [container.get("name") for container in pod.get("containers", [])]
    if names.count(WORKER_CONTAINER) > 1:
        yield f"containers: two are named {WORKER_CONTAINER}; allowed: one; rename the other"
    for container in pod.get("initContainers", []):
        if container.get("name") == WORKER_CONTAINER:
            yield f"initContainers: the name {WORKER_CONTAINER} belongs to the stage's container; rename it"
    for volume in pod.get("volumes", []):
        if volume.get("name") in OUR_VOLUMES:
            yield f"volumes: the name {volume['name']} belongs to the operator; rename it"
    for container in pod.get("containers", []):
        for mount in container.get("volumeMounts", []) if container.get("name") == WORKER_CONTAINER else []:
            if mount.get("mountPath", "").rstrip("/") in OUR_MOUNT_PATHS:
                path = mount["mountPath"]
                yield f"containers: the worker's mount path {path} belongs to the operator; use another"
    if any(gate.get("name") == GATE for gate in pod.get("schedulingGates", [])):
        yield f"schedulingGates: {GATE} belongs to the operator; remove it"


def networks_are_named_once(case: Case) -> Verdict | None:
    """Multus reads one annotation, which the spec and the template cannot both write."""
    given = (case.template.get("metadata") or {}).get("annotations") or {}
    if not case.spec.network.additional_networks or NETWORKS_ANNOTATION not in given:
        return None
    return Verdict(
        Reason.INVALID_TEMPLATE,
        f"spec.template.metadata.annotations: {NETWORKS_ANNOTATION} is set by spec.network.additionalNetworks; name "
        "all networks there, or all in the annotation",
    )


def claim_can_be_shared(case: Case) -> Verdict | None:
    """A claim that only one pod may mount serves one stage."""
    pods = case.spec.stages * case.spec.pipelines
    if case.claim is None or not case.claim.one_pod or pods == 1:
        return None
    field = "spec.model.fromJob.name" if case.spec.model.from_job else "spec.checkpoint.volumeClaimName"
    return Verdict(
        Reason.CLAIM_ACCESS_MODE,
        f'{field}: claim "{case.claim.name}" has the access mode ReadWriteOncePod, but '
        f"{pods} stage pods mount it; allowed: ReadWriteMany, or ReadWriteOnce with all stages "
        "on one node",
    )


def serves_with_our_worker(case: Case) -> Verdict | None:
    """Fronts can talk only to our own engine."""
    containers = case.template.get("spec", {}).get("containers", [])
    own: Manifest = next((item for item in containers if item.get("name") == WORKER_CONTAINER), {})
    if case.spec.mode == "Train" or not own.get("command"):
        return None
    return Verdict(
        Reason.INVALID_TEMPLATE,
        f"spec.template.spec.containers: the container worker has a command of its own, but mode {case.spec.mode} is "
        "our worker's; remove the command",
    )


CHAIN: tuple[Callable[[Case], Verdict | None], ...] = (
    enough_layers,
    boundaries_lie_inside,
    configuration_fits,
    template_leaves_ours_alone,
    networks_are_named_once,
    serves_with_our_worker,
    claim_can_be_shared,
)
