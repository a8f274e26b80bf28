"""The watch: kopf as transport, and as nothing else.

Its handlers take an object over into the cache and wake the job; kopf writes nothing, adds no finalizer and
no annotation, because there are only ``on.login`` and ``on.event`` handlers.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import kopf

from pipelinejob_operator.api.v1alpha1 import GROUP, PLURAL, VERSION
from pipelinejob_operator.build.names import MANAGED_BY, MANAGED_BY_LABEL
from pipelinejob_operator.runtime.cache import Cache, Key, is_ours, pod_key
from pipelinejob_operator.runtime.inventory import Inventory

CHUNK = 500
CONNECT_SECONDS = 10.0
REQUEST_SECONDS = 30.0


class Backoffs:
    """Seconds between tries of a request: rising to 3 and without an end.

    kopf's own default rises to 21, so that the operator would stay blind for so long after an outage, and
    then gives up.
    """

    def __iter__(self) -> Iterator[float]:
        """Go through the delays of one request."""
        return itertools.chain((0.2, 0.5, 1.0, 2.0), itertools.repeat(3.0))


def settings(*, all_pods: bool) -> kopf.OperatorSettings:
    """Settings under which kopf only watches; other pods than ours only with ``all_pods``."""
    made = kopf.OperatorSettings()
    made.scanning.disabled = True  # no rights on CRDs and namespaces needed
    made.posting.enabled = False
    made.peering.standalone = True  # leadership is the Lease's, see leader.py
    made.networking.error_backoffs = Backoffs()
    made.networking.request_timeout = REQUEST_SECONDS
    made.networking.connect_timeout = CONNECT_SECONDS
    made.watching.chunk_size = CHUNK
    if not all_pods:
        made.watching.label_selectors["v1", "pods"] = f"{MANAGED_BY_LABEL}={MANAGED_BY}"
    return made


def registry(
    cache: Cache, inventory: Inventory | None, wake: Callable[[Key], None], listed: Callable[[], None]
) -> kopf.OperatorRegistry:
    """Handlers that keep the cache and the inventory current and wake the jobs concerned.

    ``listed``: told of each object that kopf has found by a list and not by the watch; its events have no type.
    """
    made = kopf.OperatorRegistry()
    kopf.on.login(registry=made)(kopf.login_via_client)

    def told(event: kopf.RawEvent) -> tuple[dict[str, Any], bool]:
        """Return the object of an event, and whether it is gone."""
        if event["type"] is None:
            listed()
        return dict(event["object"]), event["type"] == "DELETED"

    @kopf.on.event(GROUP, VERSION, PLURAL, registry=made)
    async def job_event(*, event: kopf.RawEvent, **_: Any) -> None:
        manifest, deleted = told(event)
        meta = manifest["metadata"]
        key = Key(meta["namespace"], meta["name"])
        changed = cache.drop_job(key, meta["uid"]) if deleted else cache.put_job(manifest)
        if changed:
            wake(key)

    @kopf.on.event("v1", "pods", registry=made)
    async def pod_event(*, event: kopf.RawEvent, **_: Any) -> None:
        manifest, deleted = told(event)
        meta = manifest["metadata"]
        if inventory is not None:
            if deleted:
                inventory.drop_pod(meta["uid"])
            else:
                inventory.put_pod(manifest)
        if not is_ours(manifest):
            return
        key = pod_key(manifest)
        changed = cache.drop_pod(key, meta["name"], meta["uid"]) if deleted else cache.put_pod(manifest)
        if changed:
            wake(key)

    if inventory is not None:

        @kopf.on.event("v1", "nodes", registry=made)
        async def node_event(*, event: kopf.RawEvent, **_: Any) -> None:
            manifest, deleted = told(event)
            if deleted:
                inventory.drop_node(manifest["metadata"]["name"], manifest["metadata"]["uid"])
            else:
                inventory.put_node(manifest)

    return made


async def watch(
    cache: Cache,
    inventory: Inventory | None,
    wake: Callable[[Key], None],
    listed: Callable[[], None],
    namespace: str,
) -> None:
    """Watch jobs and their pods, in one namespace or in all (empty), until a signal, which kopf handles.

    With an ``inventory`` also all other pods, and nodes.
    """
    await kopf.operator(
        registry=registry(cache, inventory, wake, listed),
        settings=settings(all_pods=inventory is not None),
        standalone=True,
        clusterwide=not namespace,
        namespaces=[namespace] if namespace else (),
    )
