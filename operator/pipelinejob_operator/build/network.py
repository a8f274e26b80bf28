"""The job's headless Service and its NetworkPolicy."""

from typing import Any

from pipelinejob_operator.build.installation import OPERATOR_POD_LABELS, Installation
from pipelinejob_operator.build.job import Job
from pipelinejob_operator.build.names import JOB_UID_LABEL, job_labels, network_name
from pipelinejob_worker.protocol import RENDEZVOUS_PORT, STATUS_PORT

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

    In from the job's own pods, and from the operator to the status port only; out to the job's own pods, to DNS and,
    for a model from a hub, to HTTPS anywhere: a policy knows no names. It suffices in a namespace that denies
    everything else; policies add up, so users add their own.
    """
    own = {"podSelector": {"matchLabels": _own_pods(job)}}
    operator = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": installation.operator_namespace}},
        "podSelector": {"matchLabels": OPERATOR_POD_LABELS},
    }
    hub = [{"ports": [{"protocol": "TCP", "port": HUB_PORT}]}] if job.spec.model.from_hub else []
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(job),
        "spec": {
            "podSelector": {"matchLabels": _own_pods(job)},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {"from": [own]},
                {"from": [operator], "ports": [{"protocol": "TCP", "port": STATUS_PORT}]},
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
    return [service(job), *policies]


def _own_pods(job: Job) -> dict[str, str]:
    return {JOB_UID_LABEL: job.uid}


def _metadata(job: Job) -> dict[str, Any]:
    return {
        "name": network_name(job.name),
        "namespace": job.namespace,
        "labels": job_labels(job.name, job.uid),
        "ownerReferences": [job.owner_reference()],
    }
