"""Schedulers of others, as far as an API server shows them: kinds with the fields that we write, and Kueue's gate.

Their controllers do not run. A field that a kind does not have is refused by server-side apply.
"""

from typing import Any

Object = dict[str, Any]

KUEUE_GATE = "kueue.x-k8s.io/admission"


def kind(group: str, version: str, name: str, **fields: str) -> Object:
    """A CustomResourceDefinition of a namespaced kind whose spec has these fields."""
    plural = f"{name.lower()}s"
    spec = {"type": "object", "properties": {field: {"type": of} for field, of in fields.items()}}
    schema = {"type": "object", "properties": {"spec": spec}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{plural}.{group}",
            # Groups of k8s.io want to know who has approved them.
            "annotations": {"api-approved.kubernetes.io": "unapproved, a stand-in for tests"},
        },
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {"kind": name, "plural": plural, "singular": name.lower()},
            "versions": [{"name": version, "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}],
        },
    }


KINDS = (
    kind("kueue.x-k8s.io", "v1beta2", "LocalQueue", clusterQueue="string"),
    kind(
        "scheduling.volcano.sh",
        "v1beta1",
        "PodGroup",
        minMember="integer",
        queue="string",
        priorityClassName="string",
    ),
    kind("scheduling.x-k8s.io", "v1alpha1", "PodGroup", minMember="integer", scheduleTimeoutSeconds="integer"),
)


def kueue_webhook() -> tuple[tuple[str, Object], tuple[str, Object]]:
    """What Kueue's webhook adds to a pod with a queue, a gate and a finalizer: an admission policy and its binding."""
    api = "admissionregistration.k8s.io/v1"
    finalizer = "kueue.x-k8s.io/managed"
    gate = f'Object.spec.schedulingGates{{name: "{KUEUE_GATE}"}}'
    patches = (
        f'[JSONPatch{{op: "add", path: "/spec/schedulingGates/-", value: {gate}}}, '
        f'JSONPatch{{op: "add", path: "/metadata/finalizers", value: ["{finalizer}"]}}]'
    )
    policy = {
        "apiVersion": api,
        "kind": "MutatingAdmissionPolicy",
        "metadata": {"name": "kueue"},
        "spec": {
            "failurePolicy": "Fail",
            "reinvocationPolicy": "Never",
            "matchConstraints": {
                "resourceRules": [
                    {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}
                ],
                "objectSelector": {"matchExpressions": [{"key": "kueue.x-k8s.io/queue-name", "operator": "Exists"}]},
            },
            "mutations": [{"patchType": "JSONPatch", "jsonPatch": {"expression": patches}}],
        },
    }
    binding = {
        "apiVersion": api,
        "kind": "MutatingAdmissionPolicyBinding",
        "metadata": {"name": "kueue"},
        "spec": {"policyName": "kueue"},
    }
    return (
        (f"/apis/{api}/mutatingadmissionpolicies", policy),
        (f"/apis/{api}/mutatingadmissionpolicybindings", binding),
    )
