"""The present gang: what it lacks to come alive, and what it shows while it lives. Pure."""

from collections.abc import Sequence
from datetime import datetime, timedelta

from pipelinejob_operator.api.status import Status
from pipelinejob_operator.build import delegation
from pipelinejob_operator.build.delegation import Delegate
from pipelinejob_operator.build.installation import Installation
from pipelinejob_operator.build.job import Job
from pipelinejob_operator.build.membership import membership
from pipelinejob_operator.build.network import network_objects
from pipelinejob_operator.build.opening import DYNAMIC_RESOURCES, PROVISION
from pipelinejob_operator.build.pods import stage_pod
from pipelinejob_operator.controller.actions import (
    Action,
    ApplyObject,
    AskRoom,
    CreatePod,
    OpenGate,
    PlaceGang,
    SetMembership,
)
from pipelinejob_operator.controller.decision import Decision
from pipelinejob_operator.controller.observed import Gang, Observed
from pipelinejob_operator.policy import delegation as policy
from pipelinejob_operator.policy.facts import Claim, Manifest, StagePod
from pipelinejob_operator.policy.reasons import ConditionStatus, ConditionType, Reason

IMAGE_REASONS = frozenset({"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"})
CONFIG_REASONS = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError"})

SHORTEST_PATIENCE = timedelta(seconds=2)
SOURCE_PATIENCE = timedelta(seconds=5)
LONGEST_PATIENCE = timedelta(seconds=60)

Told = tuple[ConditionStatus, Reason, str]


def opened(gang: Gang, status: Status) -> bool:
    """Whether the gang was complete once, so that a missing pod is a lost one and not one still to be made.

    The gates open only when all pods exist. Where no pod is left at all, the condition Placed remembers it: a
    retired gang sets it to False in the same write that raises the attempt.
    """
    if gang.current:
        return any(pod.gate is None for pod in gang.current.values())
    return any(item.type == ConditionType.PLACED and item.status == "True" for item in status.conditions)


def patience(since: datetime | None, now: datetime) -> timedelta:
    """Exponential back-off without a counter: as long again as one has waited, within 2 to 60 s."""
    waited = now - since if since else SHORTEST_PATIENCE
    return min(max(waited, SHORTEST_PATIENCE), LONGEST_PATIENCE)


def share_host(claim: Claim | None, size: int) -> bool:
    """Whether all stages must stand on one node, because no other can mount their claim."""
    return claim is not None and claim.one_node and size > 1


def actions(job: Job, gang: Gang, seen: Observed, installation: Installation) -> list[Action]:
    """Next writes that the gang needs: first all pods, then all gates, then all memberships."""
    shape = job.shape
    scheduler = delegate(job, seen, installation)
    if not gang.complete(shape.size):
        shared = share_host(seen.claim, shape.size)
        missing = [place for place in shape.places() if place.rank not in gang.current]
        return [
            *(ApplyObject(manifest) for manifest in standing(job, seen, installation)),
            *(
                CreatePod(stage_pod(job, place, installation, share_host=shared, delegate=scheduler))
                for place in missing
            ),
        ]
    pods = [gang.current[rank] for rank in range(shape.size)]
    if gated := [pod for pod in pods if pod.gate is not None and not pod.terminating]:
        return gates(job, gated, seen)
    if not all(pod.address for pod in pods):
        return []
    attempt, replicas = job.status.attempt, job.spec.mode != "Train"
    wanted = {pod: membership(gang.current, pod.place, attempt, replicas=replicas).to_json() for pod in pods}
    # A pod that has a membership keeps it for the attempt: agents ignore another text of an epoch they have
    # seen.
    return [SetMembership(pod, value) for pod, value in wanted.items() if not pod.membership and not pod.ended]


def asked_first(todo: list[Action], seen: Observed) -> list[Action]:
    """Before the first pod of a gang is made, ask whether the nodes could hold them all."""
    pods = tuple(action.manifest for action in todo if isinstance(action, CreatePod))
    if not (seen.room_unknown and pods):
        return todo
    return [*(action for action in todo if not isinstance(action, CreatePod | ApplyObject)), AskRoom(pods)]


def gates(job: Job, gated: Sequence[StagePod], seen: Observed) -> list[Action]:
    """Open the gates: to the nodes that are planned for the pods, or wherever kube-scheduler puts them."""
    if not (seen.plans and job.spec.placement.strategy == "Planned"):
        return [OpenGate(pod) for pod in gated]
    return [] if seen.unplaced else [PlaceGang()]


def delegate(job: Job, seen: Observed, installation: Installation) -> Delegate | None:
    """The scheduler that places the job's pods; None for the operator itself."""
    return policy.chosen(job.spec.placement, served=seen.scheduler_served, allowed=installation.schedulers)


def standing(job: Job, seen: Observed, installation: Installation) -> list[Manifest]:
    """Every object that must stand before the first stage pod."""
    scheduler = delegate(job, seen, installation)
    group = delegation.group(job, scheduler) if scheduler else None
    return [*network_objects(job, installation), *([group] if group else [])]


def placed(gang: Gang, job: Job, seen: Observed) -> Told:
    """The condition Placed of a gang that is being made or lives."""
    size = gang.shape.size
    if not gang.complete(size):
        return "False", Reason.CREATING, f"{len(gang.current)} of {size} stage pods exist"
    pods = list(gang.current.values())
    if all(pod.scheduled for pod in pods):
        return "True", Reason.PLACED, f"all {size} stages have a node{_how(job, pods, seen)}"
    if seen.unplaced:
        return "False", seen.unplaced.reason, seen.unplaced.message + tied(seen.claim, size)
    return "False", *_scheduling(job, pods, seen)


def _scheduling(job: Job, pods: Sequence[StagePod], seen: Observed) -> tuple[Reason, str]:
    """What gated pods that were let go, or may be, wait for."""
    size = len(pods)
    have = f"{sum(pod.scheduled for pod in pods)} of {size} stages have a node"
    if any(pod.opened and pod.opened.why == PROVISION for pod in pods):
        limit = job.spec.placement.provision_timeout_seconds
        return Reason.PROVISIONING, f"{have}; the others wait for nodes to be provisioned, at most {limit} s"
    if stuck := [pod for pod in pods if pod.unschedulable]:
        message = f"{len(stuck)} of {size} stages find no node; {stuck[0].place}: {stuck[0].unschedulable}"
        return Reason.UNSCHEDULABLE, message + tied(seen.claim, size)
    if held := [pod for pod in pods if pod.held and not pod.scheduled]:
        return Reason.HELD, f"{len(held)} of {size} stages wait behind the scheduling gate {held[0].held[0]}"
    return Reason.SCHEDULING, have


def _how(job: Job, pods: Sequence[StagePod], seen: Observed) -> str:
    """Say what the links cross, and how the nodes were chosen where that was not as the job asked."""
    return _crossed(seen) + _chosen(job, pods, seen)


def _crossed(seen: Observed) -> str:
    if seen.located is None or len(seen.located.domains) < 2:
        return ""
    counts = ", ".join(f"{item.level} {item.count + item.between_pipelines}" for item in seen.located.status.crossings)
    return f"; links that cross {counts}"


def _chosen(job: Job, pods: Sequence[StagePod], seen: Observed) -> str:
    if job.spec.placement.strategy != "Planned":
        return ""
    if not seen.plans:
        return (
            "; chosen by kube-scheduler with affinity between neighbours: the operator is installed for one namespace, "
            "so it cannot see the nodes to plan"
        )
    if any(pod.opened and pod.opened.why == DYNAMIC_RESOURCES for pod in pods):
        return "; chosen by kube-scheduler: a DeviceClass stands behind the devices, so only it knows what is free"
    return ""


def tied(claim: Claim | None, size: int) -> str:
    """Say that a claim keeps all stages on one node, where it does."""
    if claim is None or not claim.one_node or size == 1:
        return ""
    return (
        f'; claim "{claim.name}" is ReadWriteOnce, so all {size} stages must share one node: use a ReadWriteMany '
        "claim, or a node with room for all of them"
    )


def running(gang: Gang, size: int) -> Told:
    """The condition Running of a gang that is being made or lives, and in which nothing failed."""
    pods = [gang.current[rank] for rank in sorted(gang.current)]
    alive = sum(pod.ready or pod.succeeded for pod in pods)
    if alive == size:
        return "True", Reason.RUNNING, f"all {size} stages are ready"
    for pod in pods:
        if pod.waiting and pod.waiting.reason in IMAGE_REASONS:
            return "False", Reason.IMAGE_PULL_FAILED, _no_image(pod)
        if pod.waiting and pod.waiting.reason in CONFIG_REASONS:
            return "False", Reason.CONTAINER_CONFIG_ERROR, _no_container(pod)
    if not all(pod.scheduled for pod in pods) or len(pods) < size:
        return "False", Reason.NOT_PLACED, "see the condition Placed"
    return "False", Reason.STARTING, f"{alive} of {size} stages are ready"


def _no_image(pod: StagePod) -> str:
    assert pod.waiting is not None
    return (
        f"{pod.place} on node {pod.node} cannot pull image {pod.waiting.image} ({pod.waiting.reason}: "
        f"{pod.waiting.message}); check the image's name in spec.template, that the node reaches the registry, and "
        "imagePullSecrets"
    )


def _no_container(pod: StagePod) -> str:
    assert pod.waiting is not None
    return (
        f"{pod.place} on node {pod.node} cannot start its container ({pod.waiting.reason}: "
        f"{pod.waiting.message}); mend what spec.template refers to, and the kubelet tries again by itself"
    )


def observe_placement(d: Decision) -> None:
    """Say whether every stage has a node, and who else sees to it."""
    status, reason, message = placed(d.gang, d.job, d.seen)
    scheduler = delegate(d.job, d.seen, d.installation)
    by = f"; {delegation.told(d.job, scheduler)}" if scheduler else ""
    d.draft.condition(ConditionType.PLACED, status, reason, message + by)
