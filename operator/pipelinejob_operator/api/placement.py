"""``spec.placement`` and ``status.placement``: where the stages run, and where they do run."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from pipelinejob_operator.api.delegated import Delegated
from pipelinejob_worker.protocol.base import Wire
from pipelinejob_worker.protocol.rules import cel, rule

LabelKey = Annotated[str, Field(min_length=1, max_length=316)]

HOST_LABEL = "kubernetes.io/hostname"
MAX_LEVELS = 8

_LEVELS = "has(self.topologyLevels) && size(self.topologyLevels) > 0"


class Placement(Wire):
    """Where the stages run."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            rule(
                ".topologyLevels",
                f"!({_LEVELS}) || self.topologyLevels.all(one, self.topologyLevels.exists_one(other, other == one))",
                "'%s is given twice; allowed: each level once'.format([self.topologyLevels.filter(one, "
                "!self.topologyLevels.exists_one(other, other == one))[0]])",
            ),
            rule(
                ".topologyLevels",
                f"!({_LEVELS}) || !('{HOST_LABEL}' in self.topologyLevels) || "
                f"self.topologyLevels[size(self.topologyLevels) - 1] == '{HOST_LABEL}'",
                f"'%s is narrower than a host; allowed: {HOST_LABEL} as the last level, or not at all'"
                ".format([self.topologyLevels[size(self.topologyLevels) - 1]])",
            ),
            rule(
                ".requiredLevel",
                f"!has(self.requiredLevel) || self.requiredLevel in ['', '{HOST_LABEL}'] || !({_LEVELS}) || "
                "self.requiredLevel in self.topologyLevels",
                f"'%s is none of topologyLevels; allowed: %s, {HOST_LABEL}'"
                ".format([self.requiredLevel, self.topologyLevels.join(', ')])",
            ),
        )
    )

    strategy: Literal["Planned", "Delegated"] = Field(
        "Planned",
        description="Planned: the operator chooses each stage's node, so that the chain crosses the fewest domains, "
        "and all stages get one or none. Delegated: kube-scheduler or a batch scheduler chooses.",
    )
    delegated: Delegated = Field(
        default_factory=Delegated, description="Who places the stages where the strategy is Delegated."
    )
    when_infeasible: Literal["Wait", "Provision"] = Field(
        "Wait",
        description="What a planned job does while no plan fits. Wait: its pods stay behind their gates and hold no "
        "node. Provision: they are let go unplanned, so that an autoscaler sees them, and taken back after "
        "provisionTimeoutSeconds if they are not all scheduled by then.",
    )
    provision_timeout_seconds: int = Field(
        600, ge=10, le=86400, description="How long nodes may take to come where whenInfeasible is Provision."
    )
    topology_levels: list[LabelKey] = Field(
        [],
        max_length=MAX_LEVELS,
        description="Node labels from the widest domain to the narrowest, for instance zone, rack, host; the host is "
        "always the last and need not be named. Empty: the chart's, else those that are found on the nodes.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    required_level: str = Field(
        "", max_length=316, description="All stages of the job lie in one domain of this level; the job waits for one."
    )
    separation: Literal["Off", "Preferred", "Required"] = Field(
        "Off",
        description="Whether neighbouring stages, which hold copies of each other's state, keep to different hosts, so "
        "that the loss of one host loses no state.",
    )


class CrossingStatus(Wire):
    """How many links cross a level, and no wider one."""

    level: str = Field(description="Node label of the level.")
    count: int = Field(0, description="Links between neighbouring stages of a pipeline that cross it.")
    between_pipelines: int = Field(0, description="Links between equal stages of neighbouring pipelines that cross it.")


class PlacementStatus(Wire):
    """Where the stages are, as a whole."""

    strategy: str = Field("", description="How the present pods got their nodes, for instance Planned.")
    crossings: list[CrossingStatus] = Field(
        [],
        max_length=MAX_LEVELS + 1,
        description="Links by the widest level that they cross, the widest level first.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["level"]},
    )
    cost: str = Field("", description="Sum of the links' weights, a whole number; lower is nearer.")
