"""Who waits for nodes, and what for: the gangs behind their gates, read into requests."""

from collections.abc import Mapping
from datetime import UTC, datetime

from pydantic import ValidationError

from pipelinejob_operator.api.placement import HOST_LABEL
from pipelinejob_operator.build.job import Job
from pipelinejob_operator.build.names import JOB_LABEL
from pipelinejob_operator.build.place import Shape
from pipelinejob_operator.controller.observe import owned_pods
from pipelinejob_operator.controller.observed import Gang, Observed, key_of
from pipelinejob_operator.controller.placing import Request
from pipelinejob_operator.placement.fit import Demand, demand
from pipelinejob_operator.placement.topology import Level, TopologyError, choose_labels, levels
from pipelinejob_operator.policy.facts import Manifest, StagePod, parse_time
from pipelinejob_operator.runtime.cache import Cache, Key
from pipelinejob_operator.runtime.inventory import Inventory
from pipelinejob_operator.runtime.storage import Storage


class Waiting:
    """Reads requests from what is cached; those that have not changed are remembered.

    ``configured`` are the installation's topology levels; empty: those that are found on the nodes.
    """

    def __init__(self, cache: Cache, inventory: Inventory, storage: Storage, configured: tuple[str, ...]) -> None:
        self._cache, self._inventory, self._storage, self._configured = cache, inventory, storage, configured
        self._known: dict[str, tuple[object, Request]] = {}

    def levels(self, job: Job) -> tuple[Level, ...]:
        """Return the job's levels on this cluster; raises TopologyError where they do not exist."""
        wanted, required = job.spec.placement.topology_levels, job.spec.placement.required_level
        nodes = self._inventory.nodes() if wanted else ()
        labels = choose_labels(wanted, self._configured or self._inventory.detected_levels(), nodes)
        if required not in ("", HOST_LABEL, *labels):
            raise TopologyError(
                f"spec.placement.requiredLevel: Unsupported value: {required!r}; allowed: "
                f"{', '.join(dict.fromkeys((*labels, HOST_LABEL)))}"
            )
        return levels(labels)

    def jobs(self) -> list[Key]:
        """Jobs with pods behind the gate."""
        return [_key_of(next(iter(pods.values()))) for pods in self._inventory.gated().values()]

    async def read(self, uid: str, before: Mapping[int, str]) -> tuple[Request | None, list[Request]]:
        """What the job ``uid`` asks for, read anew, and what all gangs ask for that wait, by turn.

        ``before``: where the job's stages ran, by rank.
        """
        waiting = list(self._inventory.gated())
        for gone in self._known.keys() - waiting:
            del self._known[gone]
        found: dict[str, Request] = {}
        for other in waiting:
            if request := await self._request(other, before if other == uid else None):
                found[other] = request
        return found.get(uid), sorted(found.values(), key=lambda request: request.turn)

    async def _request(self, uid: str, before: Mapping[int, str] | None) -> Request | None:
        """What one gang asks for, read anew with ``before``; None where it is not complete, or is not to be planned."""
        gated = self._inventory.gated().get(uid)
        if not gated:
            return None
        key = _key_of(next(iter(gated.values())))
        manifest, pods = self._cache.job(key), self._cache.pods(key)
        if manifest is None or manifest["metadata"]["uid"] != uid:
            return None
        stamp = (
            frozenset(gated),
            frozenset((pod["metadata"]["uid"], pod["spec"].get("nodeName")) for pod in pods),
            manifest["metadata"].get("generation"),
            self._inventory.detected_levels(),
        )
        known = self._known.get(uid)
        if known and known[0] == stamp and before is None:
            return known[1]
        try:
            job = Job.read(manifest)
            request = await self._read(key, job, owned_pods(job, pods), gated, before or {})
        except (ValidationError, TopologyError):
            return None  # its own reconcile says so
        if request:
            self._known[uid] = (stamp, request)
        return request

    async def _read(
        self, key: Key, job: Job, pods: list[StagePod], gated: Mapping[str, Manifest], before: Mapping[int, str]
    ) -> Request | None:
        shape, stages = _to_place(job, Gang.of(job, Observed(pods)))
        uids = {rank: pod.uid for rank, pod in stages.items() if pod.uid in gated}
        keep = {rank: node for rank, pod in stages.items() if rank not in uids and (node := node_of(pod))}
        if job.spec.placement.strategy != "Planned" or not uids or len(keep) + len(uids) < shape.size:
            return None
        if any(self._inventory.node(name) is None for name in keep.values()):
            return None
        asked: dict[int, Demand] = {}
        one_node = False
        for rank, uid in uids.items():
            affinities, tied = await self._storage.of(gated[uid])
            one_node |= tied and shape.size > 1
            asked[rank] = demand(gated[uid], affinities)
        any_demand = asked[min(asked)]
        return Request(
            job=str(key),
            uid=job.uid,
            shape=shape,
            demands=tuple(asked.get(rank, any_demand) for rank in range(shape.size)),
            pods=uids,
            priority=max(gated[uid]["spec"].get("priority") or 0 for uid in uids.values()),
            created=self._created(key),
            keep=keep,
            current={} if keep else before,
            levels=self.levels(job),
            rings=job.rings,
            required_level=HOST_LABEL if one_node else job.spec.placement.required_level,
            separation=job.spec.placement.separation,
        )

    def _created(self, key: Key) -> datetime:
        manifest = self._cache.job(key)
        return parse_time(manifest["metadata"]["creationTimestamp"] if manifest else None) or datetime.now(UTC)


def _to_place(job: Job, gang: Gang) -> tuple[Shape, Mapping[int, StagePod]]:
    """What is planned next: the gang with the stages that it lacks, and only then with those that are to join it."""
    if not gang.joining or any(pod.gate is not None for pod in gang.current.values()):
        return gang.shape, gang.current
    present = {key_of(pod.place): pod for pod in (*gang.current.values(), *gang.joining.values()) if pod}
    return job.shape, {place.rank: pod for place in job.shape.places() if (pod := present.get(key_of(place)))}


def node_of(pod: StagePod) -> str:
    """The node that a pod is bound to, or pinned to."""
    return pod.node or (pod.opened.node if pod.opened else "")


def _key_of(pod: Manifest) -> Key:
    meta = pod["metadata"]
    return Key(meta["namespace"], meta["labels"][JOB_LABEL])
