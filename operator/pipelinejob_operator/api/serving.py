"""The part of the API that serves: fronts, their limits, and which section belongs to which mode."""

from pydantic import ConfigDict, Field

from pipelinejob_worker.protocol import Engine
from pipelinejob_worker.protocol.base import Wire
from pipelinejob_worker.protocol.rules import cel, rule

MAX_FRONTS = 64

_ENGINE = tuple(field.alias or name for name, field in Engine.model_fields.items())


class Limits(Wire):
    """What each front accepts, and how long it waits."""

    body_bytes: int = Field(4_194_304, ge=1024, le=67_108_864, description="Largest body of a request, decompressed.")
    prompt_tokens: int = Field(131_072, ge=1, le=1_048_576, description="Most tokens of one prompt.")
    output_tokens: int = Field(32_768, ge=1, le=1_048_576, description="Most tokens of one answer.")
    requests: int = Field(
        512, ge=1, le=100_000, description="Most requests that are waiting or running; further ones are told to wait."
    )
    request_seconds: int = Field(
        600,
        ge=1,
        le=86_400,
        description="From a request's acceptance to its last token. A front that is replaced is given this time, too.",
    )
    recovery_seconds: int = Field(
        120, ge=1, le=3600, description="How long an accepted request waits for a pipeline that recovers."
    )


class Serve(Engine):
    """How the model is served."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            *(
                rule(
                    f".{field}",
                    f"self.{field} == oldSelf.{field}",
                    "'cannot change after creation; delete the job and create it anew'",
                    "FieldValueForbidden",
                )
                for field in _ENGINE
            )
        )
    )

    fronts: int = Field(
        2, ge=1, le=MAX_FRONTS, description="Pods that answer clients and hold their requests; they need no GPU."
    )
    port: int = Field(8000, ge=1, le=65535, description="Port of the Service NAME-front, behind which the fronts are.")
    bearer_token_secret_name: str = Field(
        "",
        max_length=253,
        description="Secret in the job's namespace whose key token clients must send. Empty: no token is asked for.",
    )
    tokenizer_path: str = Field(
        "",
        max_length=4096,
        pattern="^(/.*)?$",
        description="Directory inside the worker container with tokenizer.json. Empty: the model's own, or that with "
        "which the job of model.fromJob was trained.",
    )
    model_name: str = Field("", max_length=253, description="What clients call the model. Empty: the name of the job.")
    shared_service: str = Field(
        "",
        max_length=63,
        pattern="^([a-z]([-a-z0-9]*[a-z0-9])?)?$",
        description="Service with the fronts of this job and of all others in the namespace that name it: one job can "
        "take another's place without a client noticing. Empty: none. Each job has its Service NAME-front, too.",
    )
    limits: Limits = Field(default_factory=Limits, description="What each front accepts, and how long it waits.")


def section_rules() -> list[dict[str, str]]:
    """Rules over the whole spec: exactly the section of the mode, and a model that has weights."""
    return [
        *(found for mode in ("Train", "Serve", "Batch") for found in _section(mode, mode.lower())),
        rule(
            ".model.fromJob",
            "self.mode != 'Train' || !has(self.model.fromJob)",
            "'mode Train does not start from another job; allowed: preset, huggingFace or module'",
            "FieldValueForbidden",
        ),
        *(
            rule(
                f".model.{source}",
                f"self.mode == 'Train' || !has(self.model.{source})",
                f"'mode %s {why}; allowed: huggingFace or fromJob'.format([self.mode])",
                "FieldValueForbidden",
            )
            for source, why in (
                ("preset", "needs trained weights, and a preset has none"),
                ("module", "cannot give such a model a key-value cache"),
            )
        ),
        rule(
            ".checkpoint.volumeClaimName",
            "self.mode == 'Train' || !has(self.checkpoint.volumeClaimName) || self.checkpoint.volumeClaimName == ''",
            "'mode %s saves nothing; allowed: none; a checkpoint to serve is named by model.fromJob'"
            ".format([self.mode])",
            "FieldValueForbidden",
        ),
        rule(
            ".pipelines",
            "self.mode != 'Batch' || self.pipelines <= 1",
            "'%d pipelines cannot share one file of requests; allowed: 1'.format([self.pipelines])",
        ),
    ]


def _section(mode: str, section: str) -> list[dict[str, str]]:
    return [
        rule(
            f".{section}",
            f"self.mode != '{mode}' || has(self.{section})",
            f"'mode {mode} needs this section'",
            "FieldValueRequired",
        ),
        rule(
            f".{section}",
            f"self.mode == '{mode}' || !has(self.{section})",
            f"'belongs to mode {mode}, and mode is %s; remove one of them'.format([self.mode])",
            "FieldValueForbidden",
        ),
    ]
