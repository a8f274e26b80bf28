"""``spec.network`` as a pod sees it: variables of NCCL and gloo, devices, claims and further networks."""

import json
from typing import Any

from pipelinejob_operator.api.network import Network

NETWORKS_ANNOTATION = "k8s.v1.cni.cncf.io/networks"
"""What Multus reads: https://github.com/k8snetworkplumbingwg/multus-cni, docs/how-to-use.md."""

DEFAULTS = {"NCCL_DEBUG": "WARN"}
"""Variables that a template may replace. NCCL is silent by default, also about why two stages cannot meet."""


def variables(network: Network) -> dict[str, str]:
    """Variables of the job's network; those that the user names win over those that the other fields stand for."""
    found = {}
    if network.interface:
        found = {"NCCL_SOCKET_IFNAME": network.interface, "GLOO_SOCKET_IFNAME": network.interface}
    if network.infiniband_devices:
        # The = says that these are whole names: without it mlx5_1 would stand for mlx5_10 as well.
        found["NCCL_IB_HCA"] = f"={','.join(network.infiniband_devices)}"
    return found | {variable.name: variable.value for variable in network.nccl}


def annotations(network: Network) -> dict[str, str]:
    """Annotations of a stage pod: the networks that Multus attaches."""
    if not network.additional_networks:
        return {}
    return {
        NETWORKS_ANNOTATION: json.dumps(
            [item.model_dump(by_alias=True, exclude_defaults=True) for item in network.additional_networks]
        )
    }


def wire(spec: dict[str, Any], worker: dict[str, Any], network: Network) -> None:
    """Add the network's devices and claims to a pod's spec, and to its worker container, which is part of it."""
    if network.host_network:
        spec["hostNetwork"] = True
        # Else the pod would ask the node's own DNS server, which does not know the names of pods.
        spec.setdefault("dnsPolicy", "ClusterFirstWithHostNet")
    if network.rdma_resource_name:
        resources = worker.setdefault("resources", {})
        # For an extended resource the API demands that the request equals the limit.
        for kind in ("requests", "limits"):
            count = {network.rdma_resource_name: str(network.rdma_resource_count)}
            resources[kind] = (resources.get(kind) or {}) | count
    if network.resource_claims:
        claims = [claim.model_dump(by_alias=True, exclude_defaults=True) for claim in network.resource_claims]
        spec["resourceClaims"] = [*spec.get("resourceClaims", []), *claims]
        resources = worker.setdefault("resources", {})
        resources["claims"] = [*resources.get("claims", []), *({"name": claim["name"]} for claim in claims)]
