"""The job's headless Service and its NetworkPolicy."""

from typing import Any

from pipelinejob_operator.build.fronts import front_objects
from pipelinejob_operator.build.installation import OPERATOR_POD_LABELS, Installation
from pipelinejob_operator.build.job import Job
from pipelinejob_operator.build.names import FRONT_LABEL, JOB_UID_LABEL, job_labels, network_name
from pipelinejob_worker.protocol import ENGINE_PORT, RENDEZVOUS_PORT, STATUS_PORT

DNS_PORT = 53
HUB_PORT = 443


def service(job: Job) -> dict[str, Any]:
    """Headless Service: each stage pod's DNS name, also before it is ready, for the rendezvous."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(job),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": _own_pods(job),
            "ports": [
                {"name": "rendezvous", "port": RENDEZVOUS_PORT, "protocol": "TCP"},
                {"name": "status", "port": STATUS_PORT, "protocol": "TCP"},
            ],
        },
    }


def network_policy(job: Job, installation: Installation) -> dict[str, Any]:
    """NetworkPolicy of the stage pods.

    In from the job's own pods, from the operator to the status port only, and from fronts to the engine's; out to the
    job's own pods, to DNS and,
    for a model from a hub, to HTTPS anywhere: a policy knows no names. It suffices in a namespace that denies
    everything else; policies add up, so users add their own.
    """
    own = {"podSelector": _stages(job)}
    operator = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": installation.operator_namespace}},
        "podSelector": {"matchLabels": OPERATOR_POD_LABELS},
    }
    fronts = {"podSelector": {"matchLabels": {FRONT_LABEL: job.uid}}}
    serves = [{"from": [fronts], "ports": [{"protocol": "TCP", "port": ENGINE_PORT}]}] if job.spec.serve else []
    hub = [{"ports": [{"protocol": "TCP", "port": HUB_PORT}]}] if job.model.from_hub else []
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(job),
        "spec": {
            "podSelector": _stages(job),
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {"from": [own]},
                {"from": [operator], "ports": [{"protocol": "TCP", "port": STATUS_PORT}]},
                *serves,
            ],
            "egress": [
                {"to": [own]},
                {"ports": [{"protocol": protocol, "port": DNS_PORT} for protocol in ("UDP", "TCP")]},
                *hub,
            ],
        },
    }


def network_objects(job: Job, installation: Installation) -> list[dict[str, Any]]:
    """Every object that must stand before the first stage pod."""
    policies = [network_policy(job, installation)] if job.spec.network.network_policy == "Enabled" else []
    return [service(job), *policies, *front_objects(job, installation)]


def _stages(job: Job) -> dict[str, Any]:
    """Selector of the stages: fronts have the job's labels, too, and must not reach all that stages may."""
    fronts = [{"key": FRONT_LABEL, "operator": "DoesNotExist"}]
    return {"matchLabels": _own_pods(job)} | ({"matchExpressions": fronts} if job.spec.serve else {})


def _own_pods(job: Job) -> dict[str, str]:
    return {JOB_UID_LABEL: job.uid}


def _metadata(job: Job) -> dict[str, Any]:
    return {
        "name": network_name(job.name),
        "namespace": job.namespace,
        "labels": job_labels(job.name, job.uid),
        "ownerReferences": [job.owner_reference()],
    }
