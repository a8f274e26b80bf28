"""What kube-scheduler, Kueue, Volcano and scheduler-plugins want to see so that they take stage pods as one gang. Pure.

The names are those of their own documentation: https://kubernetes.io/docs/concepts/workloads/podgroup-api/,
https://kueue.sigs.k8s.io/docs/tasks/run/plain_pods/, https://volcano.sh/en/docs/podgroup/ and
https://github.com/kubernetes-sigs/scheduler-plugins/tree/master/pkg/coscheduling.
"""

from dataclasses import dataclass
from typing import Any

from pipelinejob_operator.build.job import Job
from pipelinejob_operator.build.names import gang_name, job_labels, network_name
from pipelinejob_operator.build.place import Place

KUEUE = "kueue.x-k8s.io"
KUEUE_FINALIZER = f"{KUEUE}/managed"
"""Kueue puts it on the pods that it manages, and takes it off when it has accounted for their end."""


@dataclass(frozen=True)
class Delegate:
    """A scheduler that places gangs."""

    name: str
    """As ``spec.placement.delegated.to`` and the chart write it."""
    apis: tuple[str, ...] = ()
    """Groups and versions of which one must be served, the newest first; none if it needs no API."""
    resource: str = ""
    scheduler: str = ""
    """Its usual name in ``schedulerName``; empty for kube-scheduler's own."""
    cure: str = ""
    """What to do where its API is not served."""

    @property
    def writes(self) -> bool:
        """Whether the operator makes an object for it, and so needs rights to."""
        return self.resource == "podgroups"


AFFINITY = Delegate("Affinity")
POD_GROUP = Delegate(
    "PodGroup",
    ("scheduling.k8s.io/v1beta1",),
    "podgroups",
    cure="switch on the feature gate GenericWorkload of API server, scheduler and controller manager and the API "
    "server's --runtime-config=scheduling.k8s.io/v1beta1=true (Kubernetes 1.37), or use Affinity",
)
KUEUE_QUEUE = Delegate("Kueue", (f"{KUEUE}/v1beta2", f"{KUEUE}/v1beta1"), "localqueues", cure="install Kueue")
VOLCANO = Delegate("Volcano", ("scheduling.volcano.sh/v1beta1",), "podgroups", "volcano", "install Volcano")
SCHEDULER_PLUGINS = Delegate(
    "SchedulerPlugins",
    ("scheduling.x-k8s.io/v1alpha1",),
    "podgroups",
    "scheduler-plugins-scheduler",
    "install scheduler-plugins with its CRDs",
)
DELEGATES = {item.name: item for item in (AFFINITY, POD_GROUP, KUEUE_QUEUE, VOLCANO, SCHEDULER_PLUGINS)}


def group(job: Job, delegate: Delegate) -> dict[str, Any] | None:
    """The object that stands for the gang; None where there is none to make.

    One a job: a new attempt's pods are made when those of the last one are gone, and join the same group.
    """
    if not delegate.writes:
        return None
    priority = (job.template.get("spec") or {}).get("priorityClassName")
    queue = job.spec.placement.delegated.queue_name
    size = job.shape.size
    spec: dict[str, Any]
    if delegate is POD_GROUP:
        # A pipeline without one of its stages does nothing, so preemption takes all of them or none. kube-scheduler
        # demands that the group has the priority of its pods.
        spec = {"schedulingPolicy": {"gang": {"minCount": size}}, "disruptionMode": {"all": {}}}
    else:
        spec = {"minMember": size}
    if priority and delegate is not SCHEDULER_PLUGINS:
        spec["priorityClassName"] = priority
    if queue:
        spec["queue"] = queue
    return {
        "apiVersion": delegate.apis[0],
        "kind": "PodGroup",
        "metadata": {
            "name": network_name(job.name),
            "namespace": job.namespace,
            "labels": job_labels(job.name, job.uid),
            "ownerReferences": [job.owner_reference()],
        },
        "spec": spec,
    }


def join(pod: dict[str, Any], job: Job, place: Place, delegate: Delegate) -> None:
    """Make a pod a member of its gang."""
    meta, spec = pod["metadata"], pod["spec"]
    name = network_name(job.name)
    if delegate.scheduler:
        spec.setdefault("schedulerName", delegate.scheduler)
    if delegate is POD_GROUP:
        spec["schedulingGroup"] = {"podGroupName": name}
    elif delegate is VOLCANO:
        meta["annotations"]["scheduling.k8s.io/group-name"] = name
    elif delegate is SCHEDULER_PLUGINS:
        meta["labels"]["scheduling.x-k8s.io/pod-group"] = name
    elif delegate is KUEUE_QUEUE:
        _queue(meta, job, place)


def _queue(meta: dict[str, Any], job: Job, place: Place) -> None:
    """Make a pod a member of a pod group of Kueue.

    Each attempt is a group of its own that is never completed by other pods, so that Kueue lets go of all of them, and
    queues the next attempt. The index keeps the ranks in order when Kueue assigns domains of the topology.
    """
    placement = job.spec.placement
    meta["labels"] |= {
        f"{KUEUE}/queue-name": placement.delegated.queue_name,
        f"{KUEUE}/pod-group-name": gang_name(job.name, job.status.attempt),
        f"{KUEUE}/pod-group-pod-index": str(place.rank),
    }
    meta["annotations"] |= {
        f"{KUEUE}/pod-group-total-count": str(place.shape.size),
        f"{KUEUE}/retriable-in-group": "false",
    }
    if placement.required_level:
        meta["annotations"][f"{KUEUE}/podset-required-topology"] = placement.required_level
    elif placement.topology_levels:
        # Kueue goes up from there, level by level, until the gang fits.
        meta["annotations"][f"{KUEUE}/podset-preferred-topology"] = placement.topology_levels[-1]


def told(job: Job, delegate: Delegate) -> str:
    """Who places the stages, for a condition's message."""
    queue = job.spec.placement.delegated.queue_name
    if delegate is AFFINITY:
        return "kube-scheduler places them one by one, neighbours drawn together by affinity"
    if delegate is KUEUE_QUEUE:
        return f"Kueue admits them as one pod group of LocalQueue {queue}"
    who = {POD_GROUP: "kube-scheduler", VOLCANO: "Volcano", SCHEDULER_PLUGINS: "scheduler-plugins"}[delegate]
    where = f" in queue {queue}" if queue else ""
    return f"{who} places all or none, as PodGroup {network_name(job.name)} ({delegate.apis[0]}){where}"
