"""The values of the Helm chart: these models are their single source.

``chart.py`` turns them into the chart's ``values.yaml``, ``values.schema.json`` and README.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

DNS_LABEL = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"

LabelKey = Annotated[str, Field(min_length=1, max_length=316, pattern=r"^[A-Za-z0-9]([-A-Za-z0-9_./]*[A-Za-z0-9])?$")]
Quantity = str | float


class _Values(BaseModel):
    """camelCase names; a name that is not here is refused, so a typo cannot pass for a setting."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True, extra="forbid")


class Image(_Values):
    """A container image."""

    repository: str = Field(min_length=1, description="Image without its tag, with the registry's host where needed.")
    tag: str = Field("", max_length=128, description="Tag. Empty: the version of the operator that the chart is for.")
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field(
        "IfNotPresent", description="When a node pulls the image."
    )


class ImagePullSecret(_Values):
    """A Secret with a registry's credentials."""

    name: str = Field(min_length=1, max_length=253)


class Resources(_Values):
    """Requests and limits of a container."""

    requests: dict[str, Quantity] = Field({"cpu": "100m", "memory": "128Mi"}, description="What is kept free for it.")
    limits: dict[str, Quantity] = Field(
        {"memory": "512Mi"},
        description="What it cannot exceed. It keeps all jobs and stage pods in memory, and of each other pod of "
        "the cluster about 2 KiB.",
    )


class Operator(_Values):
    """The operator's own pods."""

    image: Image = Image(repository="pipelinejob/operator")
    replicas: int = Field(2, ge=1, le=9, description="Pods. One leads; the others take over within 15 seconds.")
    resources: Resources = Resources()
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="What is logged.")
    node_selector: dict[str, str] = Field({}, description="Node labels that a node must have to run them.")
    tolerations: list[dict[str, Any]] = Field([], description="Node taints that they tolerate.")
    image_pull_secrets: list[ImagePullSecret] = Field(
        [],
        description="Secrets with the registry's credentials, for the operator's image. Stage pods take theirs from "
        "the job's template or from their namespace's service account.",
    )


class Worker(_Values):
    """The stage pods, where a job's template does not say otherwise."""

    image: Image = Image(repository="pipelinejob/worker")


class Crds(_Values):
    """The CustomResourceDefinition."""

    enabled: bool = Field(True, description="Install it and upgrade it with the chart.")
    keep: bool = Field(True, description="Keep it, and so all jobs, when the chart is removed.")


class UserRoles(_Values):
    """What the cluster's users may do with jobs."""

    enabled: bool = Field(
        True,
        description="Add jobs to the cluster roles view, edit and admin: those who may read a namespace may see its "
        "jobs, those who may edit it may change them.",
    )


class CreatorPolicy(_Values):
    """Who may create and change a job."""

    enabled: bool = Field(
        True,
        description="Refuse a job, and a change of its spec, by whoever may not create pods in its namespace: else the "
        "operator would create them for somebody who may not.",
    )


class NetworkPolicy(_Values):
    """What the operator's pods may talk to."""

    enabled: bool = Field(
        False,
        description="Admit only reads of health and metrics; let out only to DNS, the API server and the stages. "
        "Needed where the namespace denies by default.",
    )
    api_server_ports: list[Annotated[int, Field(ge=1, le=65535)]] = Field(
        [443, 6443], min_length=1, description="Ports of the API server, of its Service and of its endpoints."
    )


class Values(_Values):
    """All values of the chart."""

    operator: Operator = Operator()
    worker: Worker = Worker()
    watch_namespace: str = Field(
        "",
        pattern=f"^$|{DNS_LABEL}",
        description="The only namespace with jobs; the operator's rights then end there. Empty: all namespaces.",
    )
    topology_levels: list[LabelKey] = Field(
        [],
        max_length=8,
        description="Node labels from the widest domain to the narrowest, for instance zone and rack; the host is "
        "always the last. Empty: those of cloud providers and fabrics that the nodes have. A job may name its own.",
    )
    schedulers: list[Literal["PodGroup", "Volcano", "SchedulerPlugins"]] = Field(
        [],
        max_length=3,
        description="Schedulers that jobs may be delegated to and that want a PodGroup, which the operator then gets "
        "the rights to write: PodGroup (gangs of kube-scheduler, scheduling.k8s.io), Volcano, SchedulerPlugins. "
        "Affinity and Kueue need none.",
    )
    crds: Crds = Crds()
    user_roles: UserRoles = UserRoles()
    creator_policy: CreatorPolicy = CreatorPolicy()
    network_policy: NetworkPolicy = NetworkPolicy()
