"""``spec.network``: how the stages reach each other, and what may reach them."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from pipelinejob_worker.protocol.base import Wire
from pipelinejob_worker.protocol.rules import cel, rule

RESERVED_NCCL = {
    "NCCL_COMM_ID": "the operator decides where the group meets",
    "NCCL_HOSTID": "every stage would take the others for processes of its own host",
}
"""Variables of NCCL that no job may set, and why."""

ResourceName = Annotated[str, Field(max_length=316, pattern=r"^$|^[a-zA-Z0-9]([-a-zA-Z0-9_./]*[a-zA-Z0-9])?$")]
_LABEL = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
_DOMAIN = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"
_WHY = "{" + ", ".join(f"'{name}': '{why}'" for name, why in RESERVED_NCCL.items()) + "}"


def _given(field: str) -> str:
    return f"has(self.{field}) && self.{field} != ''"


def _names(*keys: str) -> dict[str, Any]:
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": list(keys)}


class NcclVariable(Wire):
    """A variable of NCCL."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            rule(
                ".name",
                f"!(self.name in {_WHY})",
                f"'%s cannot be set, because %s; remove it'.format([self.name, {_WHY}[self.name]])",
                "FieldValueForbidden",
            )
        )
    )

    name: str = Field(pattern=r"^NCCL_[A-Z0-9_]+$", max_length=128, description="Name, for instance NCCL_DEBUG.")
    value: str = Field(max_length=1024, description="Value.")


class AdditionalNetwork(Wire):
    """A network that Multus attaches to the stage pods beside the cluster's own."""

    name: str = Field(
        min_length=1, max_length=253, pattern=_DOMAIN, description="Name of its NetworkAttachmentDefinition."
    )
    namespace: str = Field(
        "", max_length=63, pattern=f"^$|{_LABEL}", description="Namespace of the definition. Empty: the job's own."
    )
    interface: str = Field(
        "",
        max_length=15,
        pattern=r"^[^\s/:]*$",
        description="Name of the interface in the pod. Empty: net1, net2 and so on, in order.",
    )


class NetworkClaim(Wire):
    """A claim of dynamic resource allocation (DRA) that each stage pod makes, for instance of a ComputeDomain."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            rule(
                ".resourceClaimTemplateName",
                f"({_given('resourceClaimTemplateName')}) != ({_given('resourceClaimName')})",
                "'claim %s needs exactly one source; allowed: resourceClaimTemplateName, for a claim of each pod, or "
                "resourceClaimName, for one that all share'.format([self.name])",
            )
        )
    )

    name: str = Field(min_length=1, max_length=63, pattern=_LABEL, description="Name of the claim in the pod.")
    resource_claim_template_name: str = Field(
        "",
        max_length=253,
        pattern=f"^$|{_DOMAIN}",
        description="ResourceClaimTemplate of the job's namespace: each stage pod gets a claim of its own.",
    )
    resource_claim_name: str = Field(
        "",
        max_length=253,
        pattern=f"^$|{_DOMAIN}",
        description="ResourceClaim of the job's namespace, which all stage pods share.",
    )


class Network(Wire):
    """How the stages talk."""

    network_policy: Literal["Enabled", "Disabled"] = Field(
        "Enabled",
        description="Enabled: a NetworkPolicy admits only the job's own pods and the operator's status reads, and "
        "lets the stages reach each other, DNS and, for a model from a hub, HTTPS. Interfaces of additionalNetworks "
        "and pods with hostNetwork are outside of it.",
    )
    interface: str = Field(
        "",
        max_length=64,
        description="Network interface of the stages' traffic, for NCCL and gloo. Empty: chosen by them.",
    )
    host_network: bool = Field(
        False,
        description="True: the stages use the network of their node. Ports are the node's, so a node runs one stage "
        "at most; the namespace must allow it, which the pod security levels baseline and restricted do not.",
    )
    additional_networks: list[AdditionalNetwork] = Field(
        [],
        max_length=16,
        description="Networks that Multus attaches to each stage pod, for instance one for each network card.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    infiniband_devices: list[Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.:-]+$")]] = Field(
        [],
        max_length=32,
        description="InfiniBand or RoCE devices that NCCL uses, by name, with a port where needed: mlx5_0 or mlx5_0:1. "
        "Empty: all that NCCL finds.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    rdma_resource_name: ResourceName = Field(
        "",
        description="Extended resource of an RDMA device plugin that a stage asks for, for instance "
        "rdma/rdma_shared_device_a. Empty: none.",
    )
    rdma_resource_count: int = Field(1, ge=1, le=64, description="How many of it a stage asks for.")
    resource_claims: list[NetworkClaim] = Field(
        [],
        max_length=8,
        description="Claims of dynamic resource allocation that each stage makes, for instance a channel of a "
        "ComputeDomain, which multi-node NVLink needs.",
        json_schema_extra=_names("name"),
    )
    nccl: list[NcclVariable] = Field(
        [],
        max_length=64,
        description="Variables of NCCL; they win over what the fields above stand for.",
        json_schema_extra=_names("name"),
    )
