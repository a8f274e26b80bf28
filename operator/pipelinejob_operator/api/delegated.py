"""``spec.placement.delegated``: who chooses the nodes of a job that the operator does not plan itself."""

from typing import Literal

from pydantic import ConfigDict, Field

from pipelinejob_worker.protocol.base import Wire
from pipelinejob_worker.protocol.rules import cel, rule

Scheduler = Literal["Auto", "Affinity", "PodGroup", "Kueue", "Volcano", "SchedulerPlugins"]

_QUEUE = "(has(self.queueName) && self.queueName != '')"


class Delegated(Wire):
    """Who places the stages where the strategy is Delegated. All pods are created before any may be scheduled."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            rule(
                ".queueName",
                f"self.to != 'Kueue' || {_QUEUE}",
                "'Kueue admits jobs by queue; allowed: the name of a LocalQueue of the namespace'",
                "FieldValueRequired",
            ),
            rule(
                ".queueName",
                f"!{_QUEUE} || self.to in ['Kueue', 'Volcano']",
                "'%s has no queues; allowed: none, or to: Kueue or Volcano'.format([self.to])",
                "FieldValueForbidden",
            ),
        )
    )

    to: Scheduler = Field(
        "Auto",
        description="Affinity: kube-scheduler, drawn by preferred affinity of neighbouring stages. PodGroup: the same, "
        "all or none, by the gang API scheduling.k8s.io/v1beta1. Auto: PodGroup where the API server serves it and the "
        "chart allows it, else Affinity. Kueue: a pod group in a LocalQueue, ordered by rank. Volcano and "
        "SchedulerPlugins: a PodGroup of theirs, and their scheduler unless the template names one.",
    )
    queue_name: str = Field(
        "",
        max_length=253,
        pattern=r"^$|^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$",
        description="LocalQueue of Kueue, or Queue of Volcano, whose default one is used if it is empty.",
    )
