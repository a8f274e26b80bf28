"""Settings of the process, read from its environment: the chart sets them."""

import socket
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from pipelinejob_operator.build.installation import Installation


def _split(text: object) -> object:
    return tuple(part.strip() for part in text.split(",") if part.strip()) if isinstance(text, str) else text


class Settings(BaseModel):
    """What the operator is told at its start. Each alias is an environment name."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    worker_image: str = Field(alias="PIPELINEJOB_WORKER_IMAGE", min_length=1)
    worker_image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field(
        "IfNotPresent", alias="PIPELINEJOB_WORKER_IMAGE_PULL_POLICY"
    )
    watch_namespace: str = Field("", alias="PIPELINEJOB_WATCH_NAMESPACE")
    """Empty: all namespaces."""
    topology_levels: Annotated[tuple[str, ...], BeforeValidator(_split)] = Field(
        (), alias="PIPELINEJOB_TOPOLOGY_LEVELS"
    )
    """Node labels from the widest domain to the narrowest; empty: those that are found on the nodes."""
    schedulers: Annotated[tuple[str, ...], BeforeValidator(_split)] = Field(
        "", alias="PIPELINEJOB_SCHEDULERS", validate_default=True
    )
    """Schedulers whose PodGroups the operator may write."""
    pod_name: str = Field(default_factory=socket.gethostname, alias="POD_NAME")
    pod_namespace: str = Field("default", alias="POD_NAMESPACE")
    lease_name: str = Field("pipelinejob-operator", alias="PIPELINEJOB_LEASE_NAME")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", alias="PIPELINEJOB_LOG_LEVEL")
    http_port: int = Field(8080, alias="PIPELINEJOB_HTTP_PORT", ge=1, le=65535)
    relist_seconds: float = Field(300, alias="PIPELINEJOB_RELIST_SECONDS", gt=0)

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> "Settings":
        """Read the environment; raises pydantic's ValidationError that names the variable."""
        return cls.model_validate(dict(environment))

    def installation(self) -> Installation:
        """The part of the settings that reaches the stage pods."""
        return Installation(
            worker_image=self.worker_image,
            worker_image_pull_policy=self.worker_image_pull_policy,
            topology_levels=self.topology_levels,
            operator_namespace=self.pod_namespace,
            schedulers=self.schedulers,
        )
