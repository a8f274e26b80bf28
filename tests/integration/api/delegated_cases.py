"""What the API server refuses and takes of ``spec.placement.delegated``."""

from typing import Any


def delegated(**fields: Any) -> dict[str, Any]:
    return {"spec__placement": {"strategy": "Delegated", "delegated": fields}}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown scheduler": (
        delegated(to="Slurm"),
        'spec.placement.delegated.to: Unsupported value: "Slurm": supported values: "Auto", "Affinity", "PodGroup", '
        '"Kueue", "Volcano", "SchedulerPlugins"',
    ),
    "Kueue without a queue": (
        delegated(to="Kueue"),
        "spec.placement.delegated.queueName: Required value: Kueue admits jobs by queue; allowed: the name of a "
        "LocalQueue of the namespace",
    ),
    "a queue where there are none": (
        delegated(to="PodGroup", queueName="team-a"),
        "spec.placement.delegated.queueName: Forbidden: PodGroup has no queues; allowed: none, or to: Kueue or Volcano",
    ),
}

TAKEN: dict[str, dict[str, Any]] = {
    "delegation to whatever is there": {"spec__placement": {"strategy": "Delegated"}},
    "a queue of Kueue": delegated(to="Kueue", queueName="team-a"),
    "the default queue of Volcano": delegated(to="Volcano"),
}
