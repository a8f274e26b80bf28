"""What a plan can ask for: each is a write to the API server, or several that belong together."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelinejob_operator.policy.facts import Pod, StagePod


@dataclass(frozen=True)
class ApplyObject:
    """Create an object beside the stage pods, such as a Service, or bring it in line."""

    manifest: dict[str, Any]


@dataclass(frozen=True)
class CreatePod:
    """Create a stage pod behind its scheduling gate, or a spare."""

    manifest: dict[str, Any]


@dataclass(frozen=True)
class AskRoom:
    """Ask whether the nodes could hold a gang of such pods if nothing else ran, before the first of them is made."""

    manifests: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class OpenGate:
    """Remove our scheduling gate from a pod."""

    pod: StagePod


@dataclass(frozen=True)
class PlaceGang:
    """Find nodes for the pods that wait behind their gates; pin and open all of them, or none."""


@dataclass(frozen=True)
class NoteRelease:
    """Remember that pods were taken back: their node is left out for a while, or provisioning pauses."""

    node: str


@dataclass(frozen=True)
class SetMembership:
    """Replace a pod's membership, and labels with it; refused where it is no longer what we saw.

    So a spare takes over a stage, or a pod another place, in one write.
    """

    pod: Pod
    value: str
    labels: Mapping[str, str | None] = field(default_factory=dict)
    """New values; None takes a label away."""


@dataclass(frozen=True)
class DeletePod:
    """Delete a pod, if it is still the one we saw."""

    pod: Pod


@dataclass(frozen=True)
class ReleasePod:
    """Take a finalizer off a pod that is over."""

    pod: Pod
    finalizer: str


@dataclass(frozen=True)
class DeleteJob:
    """Delete the job, if it is still the one we saw."""


Action = (
    ApplyObject
    | CreatePod
    | AskRoom
    | OpenGate
    | PlaceGang
    | NoteRelease
    | SetMembership
    | DeletePod
    | ReleasePod
    | DeleteJob
)
