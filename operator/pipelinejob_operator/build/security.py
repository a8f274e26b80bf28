"""What satisfies the restricted pod security standard, where the user does not say otherwise."""

from typing import Any

USER_ID = 65532


def pod() -> dict[str, Any]:
    """Security context of a pod."""
    return {
        "runAsNonRoot": True,
        "runAsUser": USER_ID,
        "runAsGroup": USER_ID,
        "fsGroup": USER_ID,
        # Without it the kubelet changes the owner of every file of a large checkpoint volume at each start.
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container(given: dict[str, Any]) -> dict[str, Any]:
    """Security context of a container; what is ``given`` wins."""
    defaults: dict[str, Any] = {"readOnlyRootFilesystem": True}
    if not given.get("privileged"):  # the API refuses the two together
        defaults["allowPrivilegeEscalation"] = False
    capabilities = {"drop": ["ALL"]} | (given.get("capabilities") or {})
    return defaults | given | {"capabilities": capabilities}
