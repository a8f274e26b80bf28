"""The operator's process: wiring only."""

import asyncio
import os
import secrets
import sys
import time
from datetime import timedelta

import aiohttp
import structlog
from pydantic import ValidationError

from pipelinejob_operator.controller.observe import Observer, job_rows, running_gangs
from pipelinejob_operator.controller.placer import Placer
from pipelinejob_operator.controller.reconcile import Reconciler
from pipelinejob_operator.runtime import logs, metrics
from pipelinejob_operator.runtime.agents import Agents
from pipelinejob_operator.runtime.cache import Cache, Key
from pipelinejob_operator.runtime.client import ApiError, Kubernetes
from pipelinejob_operator.runtime.health import Health
from pipelinejob_operator.runtime.inventory import Inventory
from pipelinejob_operator.runtime.leader import Leader
from pipelinejob_operator.runtime.queue import WorkQueue
from pipelinejob_operator.runtime.relist import Relist
from pipelinejob_operator.runtime.settings import Settings
from pipelinejob_operator.runtime.watch import watch
from pipelinejob_operator.runtime.workers import work

WORKERS = 8

log = structlog.get_logger("pipelinejob_operator")


async def run(settings: Settings) -> int:
    """Run until a signal (0), or until a part fails or the lease is lost (1): then the process starts
    anew.
    """
    clock = time.monotonic
    identity = f"{settings.pod_name}_{secrets.token_hex(4)}"
    leader = Leader(identity, settings.pod_namespace, settings.lease_name, clock)
    kubernetes = await Kubernetes.connect(leader.require)
    cache = Cache()
    queue: WorkQueue[Key] = WorkQueue(clock)
    agents = Agents(lambda: running_gangs(cache) if leader.leads else [], queue.add)
    # One namespace's operator may not read nodes and other namespaces' pods, so it cannot plan.
    inventory = Inventory() if not settings.watch_namespace else None
    placer = None
    if inventory is not None:
        placer = Placer(kubernetes, cache, inventory, installation=settings.installation(), wake=queue.add)
        inventory.more_room = placer.more_room
    relist = Relist(
        kubernetes,
        cache,
        inventory,
        namespace=settings.watch_namespace,
        seconds=settings.relist_seconds,
        clock=clock,
        wake=queue.add,
    )
    reconciler = Reconciler(
        kubernetes,
        cache,
        Observer(kubernetes, cache, agents),
        placer,
        installation=settings.installation(),
        instance=identity,
        network_period=timedelta(seconds=settings.relist_seconds),
    )
    health = Health(clock, settings.relist_seconds, lambda: relist.last_success, relist.synced.is_set)
    metrics.LEADER.set_function(lambda: leader.leads)
    metrics.QUEUE_DEPTH.set_function(lambda: len(queue))
    metrics.QUEUE_DELAYED.set_function(lambda: queue.delayed)
    metrics.JobCollector(lambda: job_rows(cache))
    server = await health.serve(settings.http_port)

    # A standby watches and lists too, so that its cache is warm when it wins; only the workers wait for the
    # lease.
    parts = {
        "leader": leader.run(kubernetes),
        "relist": relist.run(),
        "agents": agents.run(),
        **{
            f"worker-{number}": work(f"worker-{number}", queue, reconciler, health, (leader.elected, relist.synced))
            for number in range(WORKERS)
        },
        # Last: when it ends, it ends what began later.
        "watch": watch(cache, inventory, queue.add, relist.soon, settings.watch_namespace),
    }
    tasks = [asyncio.create_task(part, name=name) for name, part in parts.items()]
    try:
        ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        failed = [(task.get_name(), error) for task in ended if (error := task.exception())]
        for name, error in failed:
            log.error("a part of the operator failed", part=name, error=repr(error), exc_info=error)
        return 1 if failed else 0
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await _leave(leader, kubernetes)
        await server.cleanup()
        await kubernetes.close()


async def _leave(leader: Leader, kubernetes: Kubernetes) -> None:
    try:
        await leader.release(kubernetes)
    except (ApiError, aiohttp.ClientError, TimeoutError) as error:
        log.warning("cannot give the lease up; it expires by itself", error=str(error))


def main() -> None:
    """Read the settings, run, and exit with the code that ``run`` returns; 2 where a setting is wrong."""
    try:
        settings = Settings.read(os.environ)
    except ValidationError as error:
        for item in error.errors():
            sys.stderr.write(f"environment variable {item['loc'][0]}: {item['msg']}\n")
        sys.exit(2)
    logs.configure(settings.log_level)
    sys.exit(asyncio.run(run(settings)))


if __name__ == "__main__":
    main()
