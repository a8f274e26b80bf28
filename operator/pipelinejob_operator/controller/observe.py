"""Looking at a job: from the cache, and from the API server itself before anything irreversible."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime

from pydantic import ValidationError

from pipelinejob_operator.build.job import Job
from pipelinejob_operator.build.names import FRONT_LABEL, JOB_UID_LABEL, SPARE_LABEL, front_name
from pipelinejob_operator.build.source import SourceJob
from pipelinejob_operator.controller import serving
from pipelinejob_operator.controller.observed import Gang, Observed, Refusal
from pipelinejob_operator.policy import delegation, lifecycle, source
from pipelinejob_operator.policy.facts import Claim, Manifest, SparePod, StagePod
from pipelinejob_operator.policy.reasons import ConditionType, Verdict
from pipelinejob_operator.runtime.agents import Agents, Target
from pipelinejob_operator.runtime.cache import Cache, Key
from pipelinejob_operator.runtime.client import (
    CLAIMS,
    DEPLOYMENTS,
    FORBIDDEN,
    JOBS,
    NODES,
    PODS,
    ApiError,
    Kubernetes,
)
from pipelinejob_operator.runtime.discovery import Discovery
from pipelinejob_worker.protocol import ExitCode


class Observer:
    """Gathers what a plan is made from."""

    def __init__(self, kubernetes: Kubernetes, cache: Cache, agents: Agents) -> None:
        self._kubernetes, self._cache, self._agents = kubernetes, cache, agents
        self._discovery = Discovery(kubernetes)

    async def refresh(self, key: Key, uid: str) -> None:
        """Read the job and its pods anew, past the cache, into it."""
        manifest = await self._kubernetes.get(JOBS, key.namespace, key.name)
        if manifest is None or manifest["metadata"]["uid"] != uid:
            self._cache.drop_job(key, uid)
        if manifest is not None:
            self._cache.put_job(manifest)
        pods: list[Manifest] = []
        version = 0
        selector = f"{JOB_UID_LABEL}={uid}"
        async for items, version in self._kubernetes.pages(PODS, key.namespace, selector):  # noqa: B007
            pods += items
        self._cache.replace_pods(pods, version, only=key)

    async def look(self, job: Job, *, refusal: Refusal | None, network_due: bool, now: datetime) -> Observed:
        """Look at everything around a job."""
        manifests = self._cache.pods(Key(job.namespace, job.name))
        pods, spares = owned_pods(job, manifests), owned_spares(job, manifests)
        epoch = epoch_of(job)
        nodes = await self._nodes(job, pods, spares)
        seen = Observed(
            pods=pods,
            spares=spares,
            agent=self._agents.last(job.uid, epoch),
            agent_fresh=self._agents.fresh(job.uid, epoch),
            released=self._agents.released(job.uid, epoch),
            unready_nodes=frozenset(name for name, node in nodes.items() if not _ready(node)),
            node_conditions={name: _true_conditions(node) for name, node in nodes.items() if node},
            refusal=refusal if refusal and refusal.generation == job.generation and now < refusal.retry_at else None,
            scheduler_served=await self._scheduler_served(job),
            network_due=network_due,
        )
        return await self._with_claim(job, await self._serving(job, seen))

    def with_source(self, job: Job) -> Job:
        """Add to a job what it must know of the job whose model it serves."""
        found = source.find(job, self._source(job))
        return replace(job, source=found) if isinstance(found, SourceJob) else job

    def _source(self, job: Job) -> Manifest | None:
        wanted = job.spec.model.from_job
        return self._cache.job(Key(job.namespace, wanted.name)) if wanted else None

    async def _serving(self, job: Job, seen: Observed) -> Observed:
        """Look at what only a job that serves has."""
        if job.spec.mode == "Train":
            return seen
        found = source.find(job, self._source(job))
        pipelines = range(job.spec.pipelines)
        answers = [self._agents.last(job.uid, epoch_of(job), pipeline) for pipeline in pipelines]
        seen = replace(
            seen,
            pipelines=[answer for answer in answers if answer],
            source_problem=found if isinstance(found, Verdict) else None,
        )
        if job.spec.serve is None:
            return seen
        manifest = await self._kubernetes.get(DEPLOYMENTS, job.namespace, front_name(job.name))
        labels = map(_labels, self._cache.pods(Key(job.namespace, job.name)))
        pods = sum(item.get(FRONT_LABEL) == job.uid for item in labels)
        return replace(seen, fronts=serving.fronts(manifest, pods) if manifest else None)

    async def _scheduler_served(self, job: Job) -> bool:
        delegate = delegation.wanted(job.spec.placement)
        return delegate is not None and await self._discovery.serves(delegate)

    async def _with_claim(self, job: Job, seen: Observed) -> Observed:
        """Read the claim while it matters: until every stage has a node."""
        name = job.claim_name
        gang = Gang.of(job, seen)
        if not name or (gang.complete(gang.shape.size) and all(pod.scheduled for pod in gang.current.values())):
            return seen
        manifest = await self._kubernetes.get(CLAIMS, job.namespace, name)
        if manifest is None:
            return replace(seen, claim_missing=True)
        return replace(seen, claim=Claim(name, frozenset(manifest["spec"].get("accessModes", ()))))

    async def _nodes(self, job: Job, pods: list[StagePod], spares: list[SparePod]) -> dict[str, Manifest | None]:
        """Read the nodes that a plan may turn on; none where the operator may not read nodes."""
        names = (
            {pod.node for pod in (*pods, *spares)}
            if any(rule.on_node_conditions for rule in job.spec.recovery.rules)
            else _doubtful(job, pods, spares)
        )
        try:
            return {name: await self._kubernetes.get(NODES, "", name) for name in sorted(names - {""})}
        except ApiError as error:
            if error.code == FORBIDDEN:
                return {}
            raise


def _doubtful(job: Job, pods: list[StagePod], spares: list[SparePod]) -> set[str]:
    """Nodes of pods that may be lost: those that are leaving, those whose peers miss them, and those not ready.

    The cluster marks the pods of a node that does not answer as not ready.
    """
    lonely = any(pod.ended and pod.ended.exit_code == ExitCode.PEER_LOST for pod in pods)
    return {
        pod.node
        for pod in (*pods, *spares)
        if not pod.over and (pod.terminating or lonely or (job.status.group is not None and not pod.ready))
    }


def _ready(node: Manifest | None) -> bool:
    """Whether a node answers; one that is gone does not."""
    if node is None:
        return False
    conditions = node.get("status", {}).get("conditions", [])
    return not any(item["type"] == "Ready" and item["status"] != "True" for item in conditions)


def _true_conditions(node: Manifest) -> frozenset[str]:
    conditions = node.get("status", {}).get("conditions", [])
    return frozenset(item["type"] for item in conditions if item["status"] == "True")


def epoch_of(job: Job) -> int:
    """Epoch that the job's agents obey: the group's, or that of a gang that restarts as a whole."""
    return job.status.epoch if job.status.group else job.status.attempt + 1


def owned_pods(job: Job, manifests: list[Manifest]) -> list[StagePod]:
    """Read the stage pods that this job owns: those of a deleted job of the same name have another owner's UID."""
    return [StagePod.read(manifest) for manifest in _owned(job, manifests) if SPARE_LABEL not in _labels(manifest)]


def owned_spares(job: Job, manifests: list[Manifest]) -> list[SparePod]:
    """Read the spare pods that this job owns."""
    return [SparePod.read(manifest) for manifest in _owned(job, manifests) if SPARE_LABEL in _labels(manifest)]


def _owned(job: Job, manifests: list[Manifest]) -> list[Manifest]:
    return [
        manifest
        for manifest in manifests
        if any(owner["uid"] == job.uid for owner in manifest["metadata"].get("ownerReferences", ()))
    ]


def _labels(manifest: Manifest) -> dict[str, str]:
    labels: dict[str, str] = manifest["metadata"]["labels"]
    return labels


def running_gangs(cache: Cache) -> list[Target]:
    """Find the jobs whose stages run our agent and can tell their progress."""
    return [target for key, manifest in cache.jobs() for target in _targets(key, manifest, cache)]


def _targets(key: Key, manifest: Manifest, cache: Cache) -> Iterator[Target]:
    """Whom to ask: all stages of a gang that runs; of a group that recovers those that are there."""
    status = manifest.get("status", {})
    conditions = status.get("conditions", [])
    runs = any(item["type"] == ConditionType.RUNNING and item["status"] == "True" for item in conditions)
    if not runs and "group" not in status:
        return
    try:
        job = Job.read(manifest)
    except ValidationError:
        return  # its reconcile says so
    if not job.runs_agent or lifecycle.finished(job.status.conditions):
        return
    gang = Gang.of(job, Observed(owned_pods(job, cache.pods(key))))
    leavers = tuple(pod.address for pod in gang.leavers.values() if pod.started and pod.address)
    for part, pods in serving.asked(job, gang.current):
        addresses = tuple(pod.address for pod in pods if pod.started and pod.address)
        if addresses and (gang.recovers or len(addresses) == len(pods)):
            hurried = gang.recovers and (not runs or bool(leavers))
            yield Target(key, job.uid, epoch_of(job), addresses, part, leavers, hurried=hurried)


def job_rows(cache: Cache) -> Iterator[tuple[str, str, str, int, int | None]]:
    """Yield namespace, name, state, step and bubble in percent of every job, for the metrics."""
    for key, manifest in cache.jobs():
        status = manifest.get("status", {})
        progress = status.get("progress", {})
        state = status.get("summary", {}).get("state") or "Pending"
        yield key.namespace, key.name, state, progress.get("step", 0), progress.get("bubblePercent")
