"""``spec.recovery`` and ``spec.elasticity``: what answers a failure, how often, and how far a job may shrink."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from pipelinejob_worker.protocol.base import Wire
from pipelinejob_worker.protocol.recovery import RecoveryStrategy
from pipelinejob_worker.protocol.rules import cel, rule

MAX_SPARES = 64
MAX_RULES = 32
ON = ("onExitCodes", "onSignals", "onReasons", "onNodeConditions")

RuleAction = Literal["Ignore", "Restart", "ReplacePod", "FailJob"]

ExitStatus = Annotated[int, Field(ge=1, le=255)]
Signal = Annotated[str, Field(max_length=16, pattern=r"^SIG[A-Z0-9]+$")]
Word = Annotated[str, Field(max_length=128, pattern=r"^[A-Za-z][A-Za-z0-9]*$")]
_SET: dict[str, Any] = {"x-kubernetes-list-type": "set"}


class Rule(Wire):
    """An answer to certain failures. All lists that are set must match; one entry of a list suffices."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            rule(
                ".onExitCodes",
                " || ".join(f"(has(self.{name}) && size(self.{name}) > 0)" for name in ON),
                f"'rule %s matches nothing; allowed: at least one of {', '.join(ON)}'.format([self.name])",
                "FieldValueRequired",
            ),
            rule(
                ".action",
                "!has(self.onNodeConditions) || size(self.onNodeConditions) == 0 || "
                "self.action in ['ReplacePod', 'FailJob']",
                "'%s does not answer a node condition, as nothing has failed yet; allowed: ReplacePod, FailJob'"
                ".format([self.action])",
            ),
            rule(
                ".onNodeConditions",
                "!has(self.onNodeConditions) || size(self.onNodeConditions) == 0 || "
                + " && ".join(f"(!has(self.{name}) || size(self.{name}) == 0)" for name in ON[:-1]),
                "'node conditions and ends of a stage are different failures; allowed: a rule for each'",
                "FieldValueForbidden",
            ),
        )
    )

    name: str = Field(pattern=r"^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$", max_length=63, description="Name of the rule.")
    action: RuleAction = Field(
        description="Ignore: answered as always, but not counted against the budget. Restart: answered as always. "
        "ReplacePod: the stage gets a new pod, also where its process could be started again in place. FailJob: the "
        "job fails."
    )
    on_exit_codes: list[ExitStatus] = Field(
        [], max_length=64, description="Exit codes of the stage.", json_schema_extra=_SET
    )
    on_signals: list[Signal] = Field(
        [], max_length=32, description="Signals that ended it, for instance SIGSEGV.", json_schema_extra=_SET
    )
    on_reasons: list[Word] = Field(
        [],
        max_length=32,
        description="Reasons as status.firstFailure shows them, for instance OOMKilled, Hung or PodLost.",
        json_schema_extra=_SET,
    )
    on_node_conditions: list[Word] = Field(
        [],
        max_length=16,
        description="Types of conditions of a stage's node that are True, for instance GpuUnhealthy. The operator must "
        "be allowed to read nodes.",
        json_schema_extra=_SET,
    )


class Recovery(Wire):
    """What happens when a stage fails."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            rule(
                ".spares",
                "self.spares == 0 || self.strategy == 'Ladder'",
                "'%d spares take over single stages, which strategy %s never replaces; allowed: 0, or strategy Ladder'"
                ".format([self.spares, self.strategy])",
            )
        )
    )

    strategy: RecoveryStrategy = Field(
        "Ladder",
        description="Ladder: the least that helps: a new process, the container in place, a new pod or a spare for the "
        "failed stage alone, the checkpoint, fewer stages; all other stages keep their processes. RecreateAll: every "
        "pod is made anew and resumes from the checkpoint; always so for stages with a command of their own.",
    )
    max_restarts: int = Field(
        10,
        ge=0,
        le=100000,
        description="Failures that are answered within windowSeconds, by whatever rung; one more ends the job. Pods "
        "that were asked to leave do not count.",
    )
    window_seconds: int = Field(3600, ge=1, le=31536000, description="Length of the window in which failures count.")
    spares: int = Field(
        0,
        ge=0,
        le=MAX_SPARES,
        description="Pods that hold the image, the imported libraries and a GPU ready to take over any stage.",
    )
    snapshot_every_steps: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="Steps between two snapshots in memory; 0: as few as cost at most 3 % of the time.",
    )
    hang_timeout_seconds: int = Field(
        0,
        ge=0,
        le=86_400,
        description="Time after which a step counts as hung; 0: several times the slowest of the last steps.",
    )
    memory: str = Field(
        "",
        max_length=24,
        pattern=r"^([1-9][0-9]{0,15}(k|M|G|T|Ki|Mi|Gi|Ti)?)?$",
        description="Most memory that a stage's snapshots may take, for instance 8Gi: four times the state of a stage. "
        "It counts as memory of the worker container, so its request and limit must hold it. Empty: half of the "
        "container's memory limit in spec.template, else what the node has. With less than needed the job trains "
        "unprotected, and says so.",
    )
    rules: list[Rule] = Field(
        [],
        max_length=MAX_RULES,
        description="Other answers to certain failures; the first rule that matches counts.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )


class Elasticity(Wire):
    """Between how many stages the job may have."""

    min_stages: int | None = Field(
        None,
        ge=1,
        le=512,
        description="Fewest stages: the job shrinks to as few by itself while there is no room for all of spec.stages, "
        "and grows back. Absent: it waits instead.",
    )
    max_stages: int | None = Field(None, ge=1, le=512, description="Most stages that spec.stages may be set to.")
    shrink_after_seconds: int = Field(
        60, ge=1, le=86_400, description="How long a stage finds no node before the job goes on with fewer stages."
    )
