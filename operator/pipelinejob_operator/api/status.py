"""The status of a PipelineJob: what is observed, in whole numbers with the unit in the name, and words for people."""

from typing import Annotated, Literal

from pydantic import Field

from pipelinejob_operator.api.placement import MAX_LEVELS, PlacementStatus
from pipelinejob_operator.api.recovery_status import MAX_AVOIDED, AvoidedNode, GroupStatus, LastRecovery, Protection
from pipelinejob_worker.protocol.base import Wire

MAX_PODS = 512
"""Stage pods of a job, over all pipelines: each has an entry."""


class Condition(Wire):
    """One observation, as the Kubernetes API conventions define it."""

    type: str = Field(max_length=316, pattern=r"^[A-Z][A-Za-z]*$")
    status: Literal["True", "False", "Unknown"]
    observed_generation: int = Field(0, ge=0)
    last_transition_time: str = Field(json_schema_extra={"format": "date-time"})
    reason: str = Field(min_length=1, max_length=1024, pattern=r"^[A-Za-z][A-Za-z0-9_]*$")
    message: str = Field("", max_length=32768)


class StageStatus(Wire):
    """One stage."""

    index: int = Field(description="Stage, from 0 at the input to the last at the loss.")
    pipeline: int = Field(0, description="Data-parallel copy of the pipeline that it belongs to, from 0.")
    pod: str = Field("", description="Name of its pod.")
    node: str = Field("", description="Node of its pod.")
    domains: list[Annotated[str, Field(max_length=256)]] = Field(
        [],
        max_length=MAX_LEVELS,
        description="Domains that the node is in, from the widest level to the narrowest above the host.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    state: str = Field("", description="Pending, Starting, Running, Succeeded or Failed.")
    layers: str = Field("", description="Global layers that it holds, by chunk, for instance 0-2 or 0-2,9-11.")
    restarts: int = Field(0, description="How often this stage has failed, its process, its container or its pod.")
    replacement: int = Field(0, description="Which pod of this place in the present attempt it is, from 0.")
    replacement_time: str | None = Field(
        None, description="When it was last given a new pod.", json_schema_extra={"format": "date-time"}
    )
    replacement_step: int = Field(0, description="Last finished step of the job when it was last given a new pod.")
    quick_replacements: int = Field(
        0, description="New pods in quick succession without a step in between; the back-off grows with it."
    )
    container_restarts: int = Field(0, description="Restarts of its container in place that have been counted.")
    last_failure_time: str | None = Field(
        None,
        description="When its process failed last, by its own node's clock.",
        json_schema_extra={"format": "date-time"},
    )
    busy_percent: int | None = Field(
        None, description="Share of the step in which it computes: forward, backward and weight together."
    )
    forward_percent: int | None = Field(None, description="Share of the step in forward passes.")
    backward_percent: int | None = Field(
        None, description="Share of the step in backward passes; in their inputs' part where the schedule splits them."
    )
    weight_percent: int | None = Field(None, description="Share of the step in the weights' part of split backwards.")
    update_percent: int | None = Field(None, description="Share of the step in agreeing on it and updating weights.")
    waiting_percent: int | None = Field(None, description="Share of the step in waiting for other stages: the bubble.")
    sending_percent: int | None = Field(None, description="Share of the step in handing messages to other stages.")


class ProgressStatus(Wire):
    """How far the job is."""

    step: int = Field(0, description="Last finished step.")
    total_steps: int = Field(0, description="Steps of the whole job.")
    percent: int = Field(0, description="step of totalSteps.")
    loss: str = Field("", description="Loss of the last finished step.")
    validation_loss: str = Field("", description="Newest loss of the samples that are never trained on.")
    validation_step: int = Field(0, description="Last finished step when it was measured.")
    tokens_per_second: int | None = Field(
        None, description="Tokens that are trained, or generated, in a second, over all stages."
    )
    step_milliseconds: int | None = Field(None, description="Measured time of a step.")
    step_predicted_milliseconds: int | None = Field(
        None, description="Time of a step that the partition promised before the first one."
    )
    bubble_percent: int | None = Field(None, description="Measured idle share of the stages.")
    bubble_limit_percent: int | None = Field(None, description="What the schedule allows at best with equal stages.")
    bubble_predicted_percent: int | None = Field(
        None, description="Idle share that the partition promised before the first step."
    )
    model_flops_percent: int | None = Field(
        None, description="Model FLOPs utilization (MFU); only where the peak of the device is known."
    )
    model_giga_flops_per_second: int | None = Field(
        None, description="Floating-point operations of the model in a second, over all stages, in 10^9."
    )
    skipped_steps: int = Field(
        0, description="Steps since the last start whose update was skipped because float16 gradients overflowed."
    )
    remaining_seconds: int | None = Field(None, description="Estimated time to the last step.")
    last_checkpoint_step: int = Field(0, description="Step of the newest complete checkpoint.")
    requests_per_second: str = Field("", description="Requests that were answered in a second, over all pipelines.")
    prompt_tokens_per_second: int | None = Field(None, description="Tokens of prompts in a second.")
    running: int | None = Field(None, description="Requests that are being answered.")
    queued: int | None = Field(None, description="Accepted requests that wait for room in the key-value cache.")
    cache_percent: int | None = Field(None, description="Used share of the key-value cache.")


class FirstFailure(Wire):
    """The failure that came first in the last attempt that failed: the cause, not its victims."""

    stage: int
    pipeline: int = 0
    node: str = ""
    pod: str = ""
    exit_code: int = 0
    reason: str = ""
    message: str = ""
    step: int = Field(0, description="Last finished step when it failed.")
    log_tail: list[Annotated[str, Field(max_length=1024)]] = Field(
        [],
        max_length=32,
        description="Last lines that it logged.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )

    def sentence(self) -> str:
        """Say in one line which stage failed, where, and how."""
        place = f"stage {self.stage}" + (f" of pipeline {self.pipeline}" if self.pipeline else "")
        where = f" on node {self.node}" if self.node else ""
        how = f" with exit code {self.exit_code}" if self.exit_code else ""
        detail = f": {self.message}" if self.message else ""
        log = f"; last log lines: {' | '.join(self.log_tail[-3:])}" if self.log_tail else ""
        return f"{place} (pod {self.pod}){where} failed{how} ({self.reason}){detail}{log}"


class Summary(Wire):
    """Ready-made strings for kubectl's columns; no controller reads them."""

    state: str = ""
    stages: str = ""
    step: str = ""
    progress: str = ""
    loss: str = ""
    tokens_per_second: str = ""
    bubble: str = ""
    bubble_limit: str = ""
    requests_per_second: str = ""
    queue: str = ""
    fronts: str = ""
    model_flops: str = ""
    crossings: str = ""


class Status(Wire):
    """What is observed."""

    observed_generation: int = Field(0, description="Generation of the spec that this status answers.")
    conditions: list[Condition] = Field(
        [],
        max_length=16,
        description="Accepted, Placed, Running, Suspended, Succeeded, Available in mode Serve, Checkpointed where a "
        "volume is set, and Protected with recovery strategy Ladder.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    summary: Summary = Field(default_factory=Summary, description="Strings for kubectl's columns.")
    stages: list[StageStatus] = Field(
        [],
        max_length=MAX_PODS,
        description="One entry for each stage of each pipeline.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["index", "pipeline"]},
    )
    ready_stages: int = Field(0, description="Stages, over all pipelines, whose pod is ready.")
    ready_fronts: int = Field(0, description="Fronts that answer clients, in mode Serve.")
    selector: str = Field("", description="Label selector of the stage pods, for the scale subresource.")
    progress: ProgressStatus = Field(default_factory=ProgressStatus, description="How far the job is.")
    placement: PlacementStatus = Field(
        default_factory=PlacementStatus, description="How near the stages are to each other."
    )
    attempt: int = Field(0, description="Number of the present gang of pods, from 0; part of the pods' names.")
    epoch: int = Field(
        0, description="Number of the newest membership; it grows with every change of the group. Agents refuse older."
    )
    group: GroupStatus | None = Field(None, description="The stages that train together in this epoch.")
    protection: Protection | None = Field(None, description="How many steps a loss would cost.")
    last_recovery: LastRecovery | None = Field(None, description="The last recovery or rescale.")
    ready_spares: int = Field(0, description="Spare pods that could take over a stage now.")
    avoided_nodes: list[AvoidedNode] = Field(
        [],
        max_length=MAX_AVOIDED,
        description="Nodes on which stages failed of late.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )
    restarts: int = Field(0, description="Failures that were answered with a restart, over the job's life.")
    restart_times: list[Annotated[str, Field(json_schema_extra={"format": "date-time"})]] = Field(
        [],
        max_length=1000,
        description="When the restarts within recovery.windowSeconds happened.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    consecutive_restarts: int = Field(
        0, description="Restarts in a row without a step past the failure before; the back-off grows with it."
    )
    first_failure: FirstFailure | None = Field(None, description="What failed first, last time.")
    start_time: str | None = Field(
        None,
        description="When the job was last started or resumed.",
        json_schema_extra={"format": "date-time"},
    )
    completion_time: str | None = Field(
        None, description="When the job finished.", json_schema_extra={"format": "date-time"}
    )
