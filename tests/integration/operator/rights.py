"""The operator's rights, as few as it needs; the tests' operators have these and no others."""

from collections.abc import Iterator
from typing import Any


def _rule(group: str, resource: str, *verbs: str) -> dict[str, list[str]]:
    return {"apiGroups": [group], "resources": [resource], "verbs": list(verbs)}


NAMESPACED = [
    _rule("pipelinejob.dev", "pipelinejobs", "get", "list", "watch", "delete"),
    _rule("pipelinejob.dev", "pipelinejobs/status", "patch"),
    _rule("pipelinejob.dev", "pipelinejobs/finalizers", "update"),
    _rule("", "pods", "get", "list", "watch", "create", "patch", "delete"),
    _rule("", "services", "get", "create", "patch"),
    _rule("", "configmaps", "get", "create", "patch"),
    _rule("apps", "deployments", "get", "create", "patch"),
    _rule("policy", "poddisruptionbudgets", "get", "create", "patch"),
    _rule("networking.k8s.io", "networkpolicies", "get", "create", "patch"),
    _rule("", "persistentvolumeclaims", "get"),
    _rule("", "events", "create"),
    _rule("coordination.k8s.io", "leases", "get", "create", "update"),
]
POD_GROUPS = [
    _rule(group, "podgroups", "get", "create", "patch")
    for group in ("scheduling.k8s.io", "scheduling.volcano.sh", "scheduling.x-k8s.io")
]
"""For the schedulers that want a PodGroup, where the chart names them."""
CLUSTER_WIDE = [
    *NAMESPACED,
    _rule("", "nodes", "get", "list", "watch"),
    _rule("", "persistentvolumes", "get"),
    _rule("resource.k8s.io", "deviceclasses", "list"),
]
"""To plan, and to tell a dead node from a slow one; without, kube-scheduler places, and losses show later."""

GROUP = "rbac.authorization.k8s.io"


def bindings(user: str, rules: list[dict[str, list[str]]], role: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield path and manifest of a ClusterRole with these rules and its binding to a user."""
    api, name = f"{GROUP}/v1", role or user
    yield (
        f"/apis/{api}/clusterroles",
        {"apiVersion": api, "kind": "ClusterRole", "metadata": {"name": name}, "rules": rules},
    )
    yield (
        f"/apis/{api}/clusterrolebindings",
        {
            "apiVersion": api,
            "kind": "ClusterRoleBinding",
            "metadata": {"name": name},
            "roleRef": {"apiGroup": GROUP, "kind": "ClusterRole", "name": name},
            "subjects": [{"apiGroup": GROUP, "kind": "User", "name": user}],
        },
    )
