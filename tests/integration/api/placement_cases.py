"""What the API server refuses and takes of ``spec.placement``, whoever places the stages."""

from typing import Any

ZONE, RACK, HOST = "topology.kubernetes.io/zone", "example.com/rack", "kubernetes.io/hostname"


def placement(**fields: Any) -> dict[str, Any]:
    return {"spec__placement": fields}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a level given twice": (
        placement(topologyLevels=[ZONE, RACK, ZONE]),
        f"spec.placement.topologyLevels: Invalid value: {ZONE} is given twice; allowed: each level once",
    ),
    "a level below the host": (
        placement(topologyLevels=[HOST, RACK]),
        f"spec.placement.topologyLevels: Invalid value: {RACK} is narrower than a host; allowed: {HOST} as the last "
        "level, or not at all",
    ),
    "a required level that is none": (
        placement(topologyLevels=[ZONE, RACK], requiredLevel="rack"),
        f"spec.placement.requiredLevel: Invalid value: rack is none of topologyLevels; allowed: {ZONE}, {RACK}, {HOST}",
    ),
    "a provisioning that cannot succeed": (
        placement(provisionTimeoutSeconds=1),
        "spec.placement.provisionTimeoutSeconds: Invalid value: 1: spec.placement.provisionTimeoutSeconds in body "
        "should be greater than or equal to 10",
    ),
    "another wish where nothing fits": (
        placement(whenInfeasible="Preempt"),
        'spec.placement.whenInfeasible: Unsupported value: "Preempt": supported values: "Wait", "Provision"',
    ),
}

TAKEN: dict[str, dict[str, Any]] = {
    "levels with the host": placement(topologyLevels=[ZONE, HOST]),
    "one of its own levels required": placement(topologyLevels=[ZONE, RACK], requiredLevel=RACK),
    "the host required": placement(topologyLevels=[ZONE], requiredLevel=HOST),
    "a level of the chart or the nodes required": placement(requiredLevel=RACK),
    "neighbours on different hosts": placement(separation="Required"),
}
