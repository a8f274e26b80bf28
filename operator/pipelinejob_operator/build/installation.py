"""What an installation of the operator decides for all jobs."""

from dataclasses import dataclass

OPERATOR_POD_LABELS = {"app.kubernetes.io/name": "pipelinejob-operator"}
"""Labels of the operator's own pods: a job's NetworkPolicy lets them read the stages' status."""


@dataclass(frozen=True)
class Installation:
    """Values of the chart that reach the stage pods."""

    worker_image: str
    worker_image_pull_policy: str = "IfNotPresent"
    topology_levels: tuple[str, ...] = ()
    """Node labels from the widest domain to the narrowest; empty: those that are found on the nodes."""
    operator_namespace: str = "default"
    schedulers: tuple[str, ...] = ()
    """Schedulers whose PodGroups the operator has rights to, as ``spec.placement.delegated.to`` names them."""
