"""The planner's place in the world: gathers what a plan is made from, plans, and pins and opens all pods or none.

One gang at a time, in the one leader: what is pinned but not bound yet counts as taken, because the pinned pods
themselves say so. What is remembered here only saves work; a new leader starts without.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

import structlog

from pipelinejob_operator.build.installation import Installation
from pipelinejob_operator.build.job import Job
from pipelinejob_operator.build.opening import DYNAMIC_RESOURCES, PROVISION, Opened, Opening, opening
from pipelinejob_operator.controller.foresight import Foresight
from pipelinejob_operator.controller.located import locate
from pipelinejob_operator.controller.observed import Gang, Observed, Unplaced
from pipelinejob_operator.controller.placing import Cluster, Decision, Outcome, Request, decide
from pipelinejob_operator.controller.refusals import Refused, classify
from pipelinejob_operator.controller.waiting import Waiting
from pipelinejob_operator.placement.fit import Node
from pipelinejob_operator.placement.planner import Infeasible, Plan
from pipelinejob_operator.placement.topology import TopologyError
from pipelinejob_operator.policy.avoidance import avoided
from pipelinejob_operator.policy.facts import Manifest
from pipelinejob_operator.policy.reasons import Reason
from pipelinejob_operator.runtime import metrics
from pipelinejob_operator.runtime.cache import Cache, Key
from pipelinejob_operator.runtime.client import FORBIDDEN, PODS, ApiError, Kubernetes
from pipelinejob_operator.runtime.inventory import Inventory
from pipelinejob_operator.runtime.storage import Storage

PLAN_SECONDS = 30.0
"""A plan that takes longer is given up; 512 stages on 20,000 nodes take 5."""

SOON = timedelta(seconds=1)
"""How long a gang waits whose pods or nodes have not all been seen yet."""

LOOK_AGAIN = timedelta(seconds=30)
"""How long a gang without a plan waits at most before it is planned again."""

FIRST_AVOIDANCE, LONGEST_AVOIDANCE = timedelta(seconds=30), timedelta(minutes=10)
"""How long a node is left out after a stage was taken back from it; doubled if that happens again soon after."""

PAUSE_OF_PROVISIONING = timedelta(seconds=60)
"""How long a gang stays gated after it was provisioned for in vain, so that it does not hold nodes for ever."""

AT_ONCE = 16
SETTLE_SECONDS = 0.3
"""Room that appears is looked at this much later: pods of a gang end one after the other."""

log = structlog.get_logger(__name__)


@dataclass
class _Avoidance:
    until: datetime
    length: timedelta


@dataclass
class _Memory:
    """What may be forgotten at any time."""

    outcomes: dict[str, tuple[int, Outcome]] = field(default_factory=dict)
    nodes: dict[str, Mapping[int, str]] = field(default_factory=dict)
    """Nodes of the last plan of a job, by rank."""
    avoided: dict[str, _Avoidance] = field(default_factory=dict)
    paused: dict[str, datetime] = field(default_factory=dict)


class Placer:
    """Gives gangs their nodes. ``wake`` is called with the jobs that may find some now."""

    def __init__(
        self,
        kubernetes: Kubernetes,
        cache: Cache,
        inventory: Inventory,
        *,
        installation: Installation,
        wake: Callable[[Key], None],
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._kubernetes, self._cache, self._inventory = kubernetes, cache, inventory
        self._wake, self._clock = wake, clock
        self._storage = Storage(kubernetes)
        self._waiting = Waiting(cache, inventory, self._storage, installation.topology_levels)
        self._foresight = Foresight(kubernetes, inventory, self._storage, self._waiting, clock)
        self._memory = _Memory()
        self._turn = asyncio.Lock()
        self._thread: asyncio.Future[Decision] | None = None
        self._waking: asyncio.TimerHandle | None = None

    def look(self, job: Job, seen: Observed, unplaced: Unplaced | None) -> Observed:
        """Add to what is seen of a job what the inventory tells of it.

        ``unplaced`` is the last verdict; it stands until something becomes free, or its time is up.
        """
        if unplaced and (unplaced.gains != self._inventory.gains or self._clock() >= unplaced.retry_at):
            unplaced = None
        seen = replace(seen, plans=True, unplaced=unplaced)
        try:
            tree = self._waiting.levels(job)
        except TopologyError as error:
            planned = job.spec.placement.strategy == "Planned"
            return replace(seen, unfit_levels=str(error)) if planned else seen
        gang = Gang.of(job, seen)
        if not gang.current and not job.status.group:
            return self._foresight.look(job, seen)
        if not gang.complete(gang.shape.size):
            return seen
        found = [self._inventory.node(name) for name in {pod.node for pod in gang.current.values()}]
        nodes = [node for node in found if node is not None]
        if len(nodes) < len(found):
            return seen
        return replace(seen, located=locate(job, gang.shape, gang.current, nodes, tree))

    def note_release(self, job: Job, node: str) -> None:
        """Leave ``node`` out for a while; without one, pause the job's provisioning."""
        now = self._clock()
        if not node:
            self._memory.paused[job.uid] = now + PAUSE_OF_PROVISIONING
            return
        last = self._memory.avoided.get(node)
        if last is not None and now < last.until:
            return  # several stages of one gang are one reason
        again = last is not None and now < last.until + LONGEST_AVOIDANCE
        length = min(last.length * 2, LONGEST_AVOIDANCE) if last and again else FIRST_AVOIDANCE
        self._memory.avoided[node] = _Avoidance(now + length, length)

    def more_room(self) -> None:
        """Wake the gangs that wait for nodes, soon."""
        if self._waking is None and (self._inventory.gated() or self._foresight.hopeful()):
            self._waking = asyncio.get_running_loop().call_later(SETTLE_SECONDS, self._wake_waiting)

    def _wake_waiting(self) -> None:
        self._waking = None
        for key in (*self._waiting.jobs(), *self._foresight.hopeful()):
            self._wake(key)

    async def foresee(self, job: Job, pods: Sequence[Manifest]) -> Unplaced | None:
        """Say why no node could ever take the gang that ``pods`` would be; None where they may be made."""
        self._forget()
        return await self._foresight.ask(job, pods)

    async def place(self, job: Job) -> Unplaced | Refused | None:
        """Find nodes for a job's gated pods; pin and open them all, or say why none is.

        Raises ``ApiError`` where a pod is no longer what was seen: the caller looks anew.
        """
        async with self._turn:
            self._forget()
            asking, waiting = await self._waiting.read(job.uid, self._memory.nodes.get(job.uid, {}))
            gated = self._inventory.gated().get(job.uid)
            if asking is None or not gated:
                return self._not_ready(job)
            pods = {rank: gated[uid] for rank, uid in asking.pods.items()}
            if names := await self._storage.dynamic(name for item in asking.demands for name, _ in item.requests):
                log.info("devices are handed out dynamically, so kube-scheduler chooses", resources=sorted(names))
                return await self._open_unplanned(job, pods, DYNAMIC_RESOURCES)
            decision = await self._decide(asking, waiting, avoided(job.status.avoided_nodes))
            if decision is not None and isinstance(decision.mine.plan, Plan):
                return await self._open_planned(job, pods, decision.mine.plan)
            paused_until = self._memory.paused.get(job.uid, self._clock())
            if job.spec.placement.when_infeasible == "Provision" and self._clock() >= paused_until:
                return await self._open_unplanned(job, pods, PROVISION)
            return self._unplaced(decision)

    def saw(self, pod: Manifest) -> None:
        """Take over a pod that the operator has just written."""
        self._inventory.put_pod(pod)

    def _not_ready(self, job: Job) -> Unplaced:
        """There is nothing to plan yet: what was seen of the pods, or of their nodes, is not whole."""
        soon = self._clock() + SOON
        try:
            self._waiting.levels(job)
        except TopologyError as error:
            return Unplaced(Reason.UNFIT_LEVELS, str(error), self._clock() + LOOK_AGAIN, self._inventory.gains)
        return Unplaced(Reason.SCHEDULING, "waiting for what the plan starts from", soon, self._inventory.gains)

    def _unplaced(self, decision: Decision | None) -> Unplaced:
        now = self._clock()
        reason = Reason.NO_PLAN
        if decision is None:
            message = (
                f"no plan was found within {PLAN_SECONDS:.0f} s; name fewer spec.placement.topologyLevels, or use "
                "strategy Delegated"
            )
        elif decision.behind:
            reason = Reason.WAITING_FOR_TURN
            message = f"what is free is reserved for {decision.behind}, which has a higher priority or waits longer"
        else:
            assert isinstance(decision.mine.plan, Infeasible)
            message = decision.mine.plan.message
        ends = [item.until for item in self._memory.avoided.values() if item.until > now]
        return Unplaced(reason, message, min([now + LOOK_AGAIN, *ends]), self._inventory.gains)

    async def _decide(self, asking: Request, waiting: Sequence[Request], failing: Sequence[str]) -> Decision | None:
        """Plan without the ``failing`` nodes, else with them; None where that takes too long."""
        gains = self._inventory.gains
        known = {uid: outcome for uid, (seen, outcome) in self._memory.outcomes.items() if seen == gains}
        ahead = [other for other in waiting if other.uid != asking.uid and other.turn < asking.turn]
        held = self._inventory.held()
        if failing:
            without = Cluster(self._nodes(failing), held)
            decision = await self._in_thread(lambda: decide(asking, ahead, known, without))
            if decision is None or isinstance(decision.mine.plan, Plan):
                return decision
        cluster = Cluster(self._nodes(), held)
        decision = await self._in_thread(lambda: decide(asking, ahead, known, cluster))
        if decision is None:
            return None
        stuck = {uid: outcome for uid, outcome in decision.ahead.items() if not isinstance(outcome.plan, Plan)}
        if not isinstance(decision.mine.plan, Plan):
            stuck[asking.uid] = decision.mine
        self._memory.outcomes = {uid: (gains, outcome) for uid, outcome in stuck.items()}
        return decision

    async def _in_thread(self, plan: Callable[[], Decision]) -> Decision | None:
        """Plan in a thread, one plan at a time; None where that takes too long."""
        if self._thread is not None and not self._thread.done():
            return None
        self._thread = asyncio.ensure_future(asyncio.to_thread(plan))
        with metrics.PLAN_SECONDS.time():
            await asyncio.wait({self._thread}, timeout=PLAN_SECONDS)
        return self._thread.result() if self._thread.done() else None

    def _nodes(self, failing: Collection[str] = ()) -> tuple[Node, ...]:
        """The nodes; those that are left out say why."""
        now = self._clock()
        why = dict.fromkeys(failing, "avoided because stages of this job failed there again and again")
        for name, item in self._memory.avoided.items():
            if item.until > now:
                why[name] = "left out for a while because a stage found no place there"
        return tuple(
            replace(node, avoided=node.avoided or why[node.name]) if node.name in why else node
            for node in self._inventory.nodes()
        )

    def _forget(self) -> None:
        """Drop what is remembered of jobs that are gone."""
        living = {manifest["metadata"]["uid"] for _, manifest in self._cache.jobs()}
        for memory in (self._memory.nodes, self._memory.paused):
            for gone in memory.keys() - living:
                del memory[gone]
        self._foresight.forget(living)

    async def _open_planned(self, job: Job, pods: Mapping[int, Manifest], plan: Plan) -> Refused | None:
        log.info("planned", plan=plan.message)
        self._memory.nodes[job.uid] = dict(enumerate(plan.nodes))
        now = self._clock()
        return await self._open(job, {rank: Opened(at=now, node=plan.nodes[rank]) for rank in pods}, pods)

    async def _open_unplanned(self, job: Job, pods: Mapping[int, Manifest], why: str) -> Refused | None:
        return await self._open(job, dict.fromkeys(pods, Opened(at=self._clock(), why=why)), pods)

    async def _open(self, job: Job, notes: Mapping[int, Opened], pods: Mapping[int, Manifest]) -> Refused | None:
        """Open the gates of pods (by rank), several at once."""
        todo = [opening(pods[rank], notes[rank]) for rank in sorted(pods)]
        for start in range(0, len(todo), AT_ONCE):
            part = todo[start : start + AT_ONCE]
            results = await asyncio.gather(*(self._patch(job, item) for item in part), return_exceptions=True)
            for item, result in zip(part, results, strict=True):
                if isinstance(result, ApiError) and _refused(result):
                    return Refused(f"opening pod {item.name}", classify(result.message), result.message)
                if isinstance(result, BaseException):
                    raise result
        return None

    async def _patch(self, job: Job, item: Opening) -> None:
        patched = await self._kubernetes.json_patch(PODS, job.namespace, item.name, list(item.operations))
        metrics.WRITES.labels("open gate").inc()
        self._inventory.put_pod(patched)
        self._cache.put_pod(patched)


def _refused(error: ApiError) -> bool:
    """Whether the API server will not have the pod so, whatever its version: not a failed test of the patch."""
    return error.code == FORBIDDEN or " is invalid: " in error.message
