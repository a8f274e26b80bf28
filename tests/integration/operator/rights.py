"""The operator's rights, as few as it needs; the tests' operators have these and no others."""

from collections.abc import Iterator
from typing import Any

RULES: list[dict[str, list[str]]] = [
    {"apiGroups": ["pipelinejob.dev"], "resources": ["pipelinejobs"], "verbs": ["get", "list", "watch", "delete"]},
    {"apiGroups": ["pipelinejob.dev"], "resources": ["pipelinejobs/status"], "verbs": ["get", "patch"]},
    {"apiGroups": ["pipelinejob.dev"], "resources": ["pipelinejobs/finalizers"], "verbs": ["update"]},
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch", "create", "patch", "delete"]},
    {"apiGroups": [""], "resources": ["services"], "verbs": ["get", "list", "create", "patch", "delete"]},
    {
        "apiGroups": ["networking.k8s.io"],
        "resources": ["networkpolicies"],
        "verbs": ["get", "list", "create", "patch", "delete"],
    },
    {"apiGroups": [""], "resources": ["persistentvolumeclaims"], "verbs": ["get"]},
    {"apiGroups": [""], "resources": ["events"], "verbs": ["create", "patch"]},
    {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "create", "update"]},
]
"""Without nodes: reading them is an extra of the cluster-wide mode, and everything must work without."""

GROUP = "rbac.authorization.k8s.io"


def bindings(user: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield path and manifest of a ClusterRole and its binding to a user."""
    api, name = f"{GROUP}/v1", "operator-under-test"
    role = {"apiVersion": api, "kind": "ClusterRole", "metadata": {"name": name}, "rules": RULES}
    yield f"/apis/{api}/clusterroles", role
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
