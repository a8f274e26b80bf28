"""What the API server refuses and takes of ``spec.network``."""

from typing import Any


def network(**fields: Any) -> dict[str, Any]:
    return {"spec__network": fields}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an NCCL variable of another kind": (
        network(nccl=[{"name": "LD_PRELOAD", "value": "x"}]),
        'spec.network.nccl[0].name: Invalid value: "LD_PRELOAD": spec.network.nccl[0].name in body should match '
        "'^NCCL_[A-Z0-9_]+$'",
    ),
    "an NCCL variable that decides where the group meets": (
        network(nccl=[{"name": "NCCL_DEBUG", "value": "INFO"}, {"name": "NCCL_COMM_ID", "value": "10.0.0.1:1"}]),
        "spec.network.nccl[1].name: Forbidden: NCCL_COMM_ID cannot be set, because the operator decides where the "
        "group meets; remove it",
    ),
    "an NCCL variable that makes all hosts one": (
        network(nccl=[{"name": "NCCL_HOSTID", "value": "one"}]),
        "spec.network.nccl[0].name: Forbidden: NCCL_HOSTID cannot be set, because every stage would take the others "
        "for processes of its own host; remove it",
    ),
    "an NCCL variable twice": (
        network(nccl=[{"name": "NCCL_DEBUG", "value": "INFO"}, {"name": "NCCL_DEBUG", "value": "WARN"}]),
        'spec.network.nccl[1]: Duplicate value: {"name":"NCCL_DEBUG"}',
    ),
    "a claim without a source": (
        network(resourceClaims=[{"name": "domain"}]),
        "spec.network.resourceClaims[0].resourceClaimTemplateName: Invalid value: claim domain needs exactly one "
        "source; allowed: resourceClaimTemplateName, for a claim of each pod, or resourceClaimName, for one that all "
        "share",
    ),
    "a claim with two sources": (
        network(resourceClaims=[{"name": "a", "resourceClaimTemplateName": "b", "resourceClaimName": "c"}]),
        "spec.network.resourceClaims[0].resourceClaimTemplateName: Invalid value: claim a needs exactly one source; "
        "allowed: resourceClaimTemplateName, for a claim of each pod, or resourceClaimName, for one that all share",
    ),
    "a device that would hide others": (
        network(infinibandDevices=["mlx5_0", "^mlx5_1"]),
        'spec.network.infinibandDevices[1]: Invalid value: "^mlx5_1": spec.network.infinibandDevices[1] in body should '
        "match '^[A-Za-z0-9_.:-]+$'",
    ),
    "no RDMA devices of a resource": (
        network(rdmaResourceName="rdma/hca", rdmaResourceCount=0),
        "spec.network.rdmaResourceCount: Invalid value: 0: spec.network.rdmaResourceCount in body should be greater "
        "than or equal to 1",
    ),
    "a network in another way of writing": (
        network(additionalNetworks=[{"name": "fabric/rail-0"}]),
        'spec.network.additionalNetworks[0].name: Invalid value: "fabric/rail-0": '
        "spec.network.additionalNetworks[0].name in body should match '^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$'",
    ),
}

TAKEN: dict[str, dict[str, Any]] = {
    "every field of the network": network(
        interface="eth0",
        hostNetwork=True,
        additionalNetworks=[{"name": "rail-0", "namespace": "fabric", "interface": "net1"}, {"name": "rail-1"}],
        infinibandDevices=["mlx5_0", "mlx5_1:1"],
        rdmaResourceName="rdma/hca",
        rdmaResourceCount=8,
        resourceClaims=[
            {"name": "domain", "resourceClaimTemplateName": "tiny-domain"},
            {"name": "card", "resourceClaimName": "card"},
        ],
        nccl=[{"name": "NCCL_IB_QPS_PER_CONNECTION", "value": "4"}],
    ),
}
