"""Foresight: before the first pod of a gang is made, whether the nodes could hold the gang if nothing else ran.

Where they could not, no pod is made: it would only wait, and nothing that ends would help it. The answer stands until
a node comes or changes. What is asked for is read from a rehearsal, because admission adds to pods: tolerations for
devices, limits of the namespace, the overhead of a runtime class.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from pipelinejob_operator.api.placement import HOST_LABEL
from pipelinejob_operator.build.job import Job
from pipelinejob_operator.controller.observed import Observed, Unplaced
from pipelinejob_operator.controller.placing import Request, hopeless
from pipelinejob_operator.controller.waiting import Waiting
from pipelinejob_operator.placement.fit import Demand, demand
from pipelinejob_operator.placement.topology import TopologyError, read_node
from pipelinejob_operator.policy.facts import Manifest
from pipelinejob_operator.policy.reasons import Reason
from pipelinejob_operator.runtime.cache import Key
from pipelinejob_operator.runtime.client import (
    BAD_REQUEST,
    CONFLICT,
    FORBIDDEN,
    PODS,
    UNPROCESSABLE,
    ApiError,
    Kubernetes,
)
from pipelinejob_operator.runtime.inventory import Inventory
from pipelinejob_operator.runtime.storage import Storage

ASK_AGAIN = timedelta(seconds=30)
"""How long an answer stands at most: not all that admission adds, nor volumes, are watched."""

UNREHEARSED = (BAD_REQUEST, FORBIDDEN, CONFLICT, UNPROCESSABLE)
"""Answers to a rehearsal after which the pod itself is tried: it is refused with better words, or taken."""


@dataclass(frozen=True)
class _Answer:
    key: Key
    generation: int
    layouts: int
    verdict: Unplaced | None


class Foresight:
    """Remembers, by a job's UID, what was answered; that only saves work."""

    def __init__(
        self,
        kubernetes: Kubernetes,
        inventory: Inventory,
        storage: Storage,
        waiting: Waiting,
        clock: Callable[[], datetime],
    ) -> None:
        self._kubernetes, self._inventory, self._storage = kubernetes, inventory, storage
        self._waiting, self._clock = waiting, clock
        self._answers: dict[str, _Answer] = {}

    def look(self, job: Job, seen: Observed) -> Observed:
        """Add what is known of a job whose gang has no pod yet, or that it is to be asked."""
        placement = job.spec.placement
        if placement.strategy != "Planned" or placement.when_infeasible != "Wait":
            return seen
        answer = self._answers.get(job.uid)
        if answer is None or answer.generation != job.generation:
            return replace(seen, room_unknown=True)
        verdict = answer.verdict
        if verdict and (answer.layouts != self._inventory.layouts or self._clock() >= verdict.retry_at):
            return replace(seen, room_unknown=True)
        return replace(seen, hopeless=verdict)

    def hopeful(self) -> list[Key]:
        """Jobs without room whose answer may be another one now."""
        return [one.key for one in self._answers.values() if one.verdict and one.layouts != self._inventory.layouts]

    def forget(self, living: set[str]) -> None:
        """Drop what is remembered of jobs that are gone."""
        for gone in self._answers.keys() - living:
            del self._answers[gone]

    async def ask(self, job: Job, pods: Sequence[Manifest]) -> Unplaced | None:
        """Why the nodes could not hold ``pods``, all of a gang, even if nothing else ran; None where they could."""
        layouts, nodes = self._inventory.layouts, self._inventory.manifests()
        verdict = None
        if request := await self._request(job, pods):
            found = await asyncio.to_thread(lambda: hopeless(request, [read_node(node, {}) for node in nodes]))
            if found:
                gains = self._inventory.gains
                verdict = Unplaced(Reason.NO_PLAN, found, self._clock() + ASK_AGAIN, gains)
        self._answers[job.uid] = _Answer(Key(job.namespace, job.name), job.generation, layouts, verdict)
        return verdict

    async def _request(self, job: Job, pods: Sequence[Manifest]) -> Request | None:
        """What the gang would ask for; None where only the pods themselves can tell, or only kube-scheduler."""
        if len(pods) != job.shape.size:
            return None  # spares take places, or some pods are to come later
        try:
            tree = self._waiting.levels(job)
        except TopologyError:
            return None  # the next look says so
        admitted: dict[Demand, Demand] = {}
        one_node = False
        for pod in pods:
            if (written := demand(pod)) in admitted:
                continue
            try:
                made = await self._kubernetes.rehearse(PODS, pod)
            except ApiError as error:
                if error.code in UNREHEARSED:
                    return None
                raise
            affinities, tied = await self._storage.of(made)
            one_node |= tied and len(pods) > 1
            admitted[written] = demand(made, affinities)
        if await self._storage.dynamic(name for item in admitted.values() for name, _ in item.requests):
            return None
        return Request(
            job=str(Key(job.namespace, job.name)),
            uid=job.uid,
            shape=job.shape,
            demands=tuple(admitted[demand(pod)] for pod in pods),
            levels=tree,
            rings=job.rings,
            required_level=HOST_LABEL if one_node else job.spec.placement.required_level,
            separation=job.spec.placement.separation,
        )
