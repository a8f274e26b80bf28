"""A plan in the making: the facts of one look at a job, and what has been decided so far."""

from collections.abc import Iterable
from datetime import datetime

from pipelinejob_operator.build.delegation import KUEUE_FINALIZER
from pipelinejob_operator.build.installation import Installation
from pipelinejob_operator.build.job import Job
from pipelinejob_operator.build.place import Shape
from pipelinejob_operator.controller.actions import Action, DeletePod, ReleasePod
from pipelinejob_operator.controller.observed import Gang, Observed
from pipelinejob_operator.controller.status import Draft, rfc3339
from pipelinejob_operator.policy.facts import Pod
from pipelinejob_operator.policy.reasons import ConditionType, Reason


class Decision:
    """A plan in the making: the facts, and what has been decided so far."""

    def __init__(self, job: Job, seen: Observed, now: datetime, installation: Installation) -> None:
        self.job, self.seen, self.now, self.installation = job, seen, now, installation
        self.gang = Gang.of(job, seen)
        self.draft = Draft(job, now)
        self.actions: list[Action] = []
        self.alarms: list[datetime] = []
        self.irreversible = False
        """Whether something is given up, beside what the actions and the attempt say."""

    def keep_shape(self, shape: Shape) -> None:
        """Go on as if the spec asked for the shape that the job has."""
        self.job = self.job.in_shape(shape)
        self.gang = Gang.of(self.job, self.seen)

    def delete(self, pods: Iterable[Pod]) -> None:
        """Ask for the deletion of those pods that nobody has deleted yet, and let those go that are over."""
        for pod in pods:
            if not pod.terminating:
                self.actions.append(DeletePod(pod))
            elif KUEUE_FINALIZER in pod.finalizers and (not pod.scheduled or not pod.active):
                # Kueue keeps such a pod until another takes its place, and the next attempt waits for it to go.
                self.actions.append(ReleasePod(pod, KUEUE_FINALIZER))

    def retire(self) -> None:
        """Raise the attempt, so that the present pods belong to the past."""
        self.draft.retire()

    def say(self, kind: ConditionType, reason: Reason, message: str) -> None:
        """Set a condition to False."""
        self.draft.condition(kind, "False", reason, message)

    def down(self, reason: Reason, message: str) -> None:
        """Nothing is placed and nothing runs, both for the same reason."""
        self.say(ConditionType.PLACED, reason, message)
        self.say(ConditionType.RUNNING, reason, message)

    def fail(self, reason: Reason, message: str) -> "Decision":
        """Let the job fail, for good."""
        self.draft.condition(ConditionType.SUCCEEDED, "False", reason, message)
        return self.end()

    def end(self) -> "Decision":
        """The job has finished, well or not."""
        self.down(Reason.FINISHED, "the job has finished")
        self.say(ConditionType.SUSPENDED, Reason.NOT_SUSPENDED, "the job has finished")
        self.draft.set(completion_time=rfc3339(self.now), ready_spares=0)
        return self
