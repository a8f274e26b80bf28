"""The same job where the cluster's administrators are strict."""

import re

import pytest

from tests.cluster import faults
from tests.e2e import kit
from tests.e2e.conftest import TEXT
from tests.e2e.losses import undisturbed

RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
QUOTA = {
    "apiVersion": "v1",
    "kind": "ResourceQuota",
    "metadata": {"name": "all"},
    "spec": {
        "hard": {
            "pods": "4",
            "requests.cpu": "4",
            "requests.memory": "12Gi",
            "limits.memory": "24Gi",
            "requests.nvidia.com/gpu": "2",
        }
    },
}
LIMITS = {
    "apiVersion": "v1",
    "kind": "LimitRange",
    "metadata": {"name": "defaults"},
    "spec": {
        "limits": [
            {
                "type": "Container",
                "defaultRequest": {"cpu": "100m", "memory": "1Gi"},
                "default": {"memory": "6Gi"},
            }
        ]
    },
}
DENY_ALL = {
    "apiVersion": "networking.k8s.io/v1",
    "kind": "NetworkPolicy",
    "metadata": {"name": "deny"},
    "spec": {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]},
}


def test_restricted_security_quota_limits_and_default_deny(request: pytest.FixtureRequest) -> None:
    with kit.namespace("hostile", RESTRICTED) as namespace:
        namespace.text("text", TEXT)
        namespace.claim("state")
        namespace.apply(QUOTA, LIMITS, DENY_ALL)
        spec = kit.spec(2, 60, checkpoint={"volumeClaimName": "state", "everySteps": 20})
        run = kit.Job(namespace, "train", spec).create()
        run.wait_step(10)
        worker = run.pods()[0]["spec"]["containers"][0]
        assert worker["resources"]["limits"]["memory"] == "6Gi", "the LimitRange has spoken"
        run.wait_succeeded()
        assert run.status["restarts"] == 0
        assert tuple(run.losses("state")) == undisturbed(60)


def test_a_cluster_without_restart_in_place(namespace: kit.Namespace) -> None:
    with faults.feature_gates(RestartAllContainersOnContainerExits=False):
        namespace.claim("state")
        spec = kit.spec(2, 60, checkpoint={"volumeClaimName": "state", "everySteps": 20})
        run = kit.Job(namespace, "train", spec).create()
        run.wait_step(25)
        pod = run.pods()[1]["metadata"]["name"]
        assert re.fullmatch("train-s1-a0", pod)
        kit.kubectl("delete", "pod", pod, "-n", namespace.name, "--grace-period=0", "--force")
        run.wait_succeeded()
        assert tuple(run.losses("state")) == undisturbed(60)
