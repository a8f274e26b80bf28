"""How long the planner takes, how much memory, and what its plans cost beside other ways to place the same stages.

Clusters are made up: four levels, hosts of eight GPUs, racks that are empty, partly or wholly taken by pods. They
enter as manifests, as they would from the API server. Prints a table and, as the last line, one JSON object.
"""

import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from random import Random
from typing import Any

from pipelinejob_operator.placement.affinity import HOST_LEVEL
from pipelinejob_operator.placement.fit import Demand, Node, demand
from pipelinejob_operator.placement.planner import Plan, cost_of, plan
from pipelinejob_operator.placement.topology import Level, levels, path, read_nodes
from pipelinejob_operator.placement.tree import Domain, build

LEVELS = levels(["topology.kubernetes.io/zone", "example.com/block", "example.com/rack"])
GPU = "nvidia.com/gpu"
HOSTS_IN_RACK, RACKS_IN_BLOCK, BLOCKS_IN_ZONE, GPUS = 16, 16, 4, 8
RUNS = 7
CALM = 1.5
"""Load below which times are worth keeping."""

ASKED = {"cpu": "8", "memory": "64Gi", GPU: "1"}
STAGE_POD = {"spec": {"containers": [{"name": "worker", "resources": {"requests": ASKED, "limits": ASKED}}]}}

Manifest = dict[str, Any]
Placement = Sequence[str]
"""Names of nodes by rank."""


@dataclass(frozen=True)
class Case:
    """``seconds`` and ``mib`` are limits of the median plan and of the whole process; none if 0.

    ``taken`` has the shares of GPUs that are in use, one of them by chance in each rack.
    """

    stages: int
    nodes: int
    pipelines: int = 1
    taken: tuple[float, ...] = (0.0, 0.5, 0.7, 0.9, 1.0)
    seconds: float = 0
    mib: int = 0


CROWDED = (0.7, 0.9, 0.95, 1.0)

CASES = (
    Case(64, 5_000, seconds=0.3, mib=300),
    Case(512, 20_000, seconds=5),
    Case(64, 5_000, taken=CROWDED),
    Case(512, 20_000, taken=CROWDED),
    Case(8, 5_000, pipelines=8),
)


def manifests(case: Case) -> tuple[list[Manifest], list[Manifest]]:
    """The nodes of ``case`` and the pods on them; always the same for one case."""
    random = Random(case.nodes)  # noqa: S311
    nodes: list[Manifest] = []
    pods: list[Manifest] = []
    for number in range(case.nodes):
        rack = number // HOSTS_IN_RACK
        block, zone = rack // RACKS_IN_BLOCK, rack // RACKS_IN_BLOCK // BLOCKS_IN_ZONE
        if number % HOSTS_IN_RACK == 0:
            taken = random.choice(case.taken)
        name = f"node-{number:05}"
        labels = dict(zip((level.label for level in LEVELS[:-1]), (f"z{zone}", f"b{block}", f"r{rack}"), strict=True))
        nodes.append(
            {
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {"name": name, "namespace": "", "labels": {**labels, HOST_LEVEL: name}},
                "spec": {},
                "status": {"allocatable": {"cpu": "96", "memory": "1Ti", GPU: str(GPUS), "pods": "110"}},
            }
        )
        gpus = sum(random.random() < taken for _ in range(GPUS))
        if gpus:
            requests = {"cpu": str(8 * gpus), "memory": f"{64 * gpus}Gi", GPU: str(gpus)}
            container = {"name": "other", "image": "other", "resources": {"requests": requests, "limits": requests}}
            pods.append(
                {
                    "apiVersion": "v1",
                    "kind": "Pod",
                    "metadata": {"name": f"on-{name}", "namespace": "default"},
                    "spec": {"nodeName": name, "containers": [container]},
                    "status": {"phase": "Running"},
                }
            )
    return nodes, pods


def greedy(rooms: Mapping[tuple[str, ...], int], stages: int) -> list[str]:
    """Consecutive ranks packed into the narrowest domain that holds all, fullest first, the roomiest parts first.

    What topology-aware queueing does: it minimizes the domains of one level at a time.
    """
    root = build(rooms)
    domain, inside = root, [root]
    while inside:
        domain = min(inside, key=lambda item: (item.room, item.path))
        inside = [child for child in domain.children if child.room >= stages]

    def pack(domain: Domain, count: int) -> Iterator[str]:
        if not domain.children:
            yield from [domain.path[-1]] * count
            return
        for child in sorted(domain.children, key=lambda child: (-child.room, child.path)):
            share = min(child.room, count)
            if share:
                yield from pack(child, share)
            count -= share

    return list(pack(domain, stages))


def at_random(rooms: Mapping[tuple[str, ...], int], stages: int, seed: int) -> list[str]:
    """Any places."""
    places = [host[-1] for host in sorted(rooms) for _ in range(rooms[host])]
    return Random(seed).sample(places, stages)  # noqa: S311


def by_kube_scheduler(case: Case) -> Placement:
    """The nodes by rank that the real scheduler chooses on this cluster."""
    from tools.bench import kube_scheduler  # noqa: PLC0415 - its client would count as memory of the planner

    nodes, pods = manifests(case)
    labels = [level.label for level in LEVELS]
    return kube_scheduler.place(nodes, pods, STAGE_POD, (case.stages, case.pipelines), labels)


def run(case: Case) -> dict[str, Any]:
    """Measure the planner on ``case``, and compare its plan with others that take a moment."""
    nodes, pods = manifests(case)
    demands = [demand(STAGE_POD)] * (case.stages * case.pipelines)
    started = time.perf_counter()
    read = read_nodes(nodes, pods)
    reading = time.perf_counter() - started
    seconds = []
    for _ in range(RUNS):
        started = time.perf_counter()
        found = plan(read, LEVELS, demands, pipelines=case.pipelines)
        seconds.append(time.perf_counter() - started)
    if not isinstance(found, Plan):
        raise TypeError(f"the cluster of {case} is to have room: {found.message}")
    mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return {
        "stages": case.stages,
        "pipelines": case.pipelines,
        "nodes": case.nodes,
        "crowded": case.taken == CROWDED,
        "seconds": round(statistics.median(seconds), 3),
        "read_seconds": round(reading, 3),
        "mib": mib,
        "least": found.least,
        "cost": {"planned": found.cost, **_others(case, read, demands[0])},
    }


def cost(case: Case, names: Placement) -> int:
    """What a placement of ``case`` costs."""
    return cost_of(read_nodes(manifests(case)[0], ()), LEVELS, names, case.pipelines).cost


def _others(case: Case, nodes: Sequence[Node], one: Demand) -> dict[str, int]:
    rooms = {path(node, LEVELS): one.room(node.free) for node in nodes}
    ranks = case.stages * case.pipelines

    def cost(names: Placement) -> int:
        return cost_of(nodes, LEVELS, names, case.pipelines).cost

    return {
        "greedy": cost(greedy(rooms, ranks)),
        "random": int(statistics.median(cost(at_random(rooms, ranks, seed)) for seed in range(5))),
    }


def in_levels(cost: int, tree: Sequence[Level]) -> str:
    """``cost`` as crossings by level, from the widest: with the default weights it has them as its digits."""
    counts = []
    for level in tree:
        count, cost = divmod(cost, level.weight)
        counts.append(str(count))
    return "/".join(counts)


def main() -> int:
    """Run every case in a process of its own; 1 if a limit is missed on a calm machine."""
    load = os.getloadavg()[0]
    results = []
    print(f"crossings are {'/'.join(level.label.split('/')[-1] for level in LEVELS)}; load {load:.1f}")
    columns = ("planned", "kube_scheduler", "greedy", "random")
    print(f"{'stages':>14} {'nodes':>7} {'seconds':>8} {'read':>6} {'MiB':>5}", *(f"{name:>16}" for name in columns))
    for case in CASES:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            result = pool.submit(run, case).result()
        result["cost"]["kube_scheduler"] = cost(case, by_kube_scheduler(case))
        results.append(result)
        stages = f"{case.pipelines} x {case.stages}" if case.pipelines > 1 else str(case.stages)
        stages += " crowded" if result["crowded"] else ""
        print(
            f"{stages:>14} {case.nodes:>7} {result['seconds']:>8} {result['read_seconds']:>6} {result['mib']:>5}",
            *(f"{in_levels(result['cost'][name], LEVELS):>16}" for name in columns),
        )
    missed = [
        f"{case.stages} stages on {case.nodes} nodes: {result[name]} {name}, limit {limit}"
        for case, result in zip(CASES, results, strict=True)
        for name, limit in (("seconds", case.seconds), ("mib", case.mib))
        if limit and result[name] > limit
    ]
    calm = load < CALM
    if not calm:
        print(f"preliminary: the machine is busy (load {load:.1f}); run again when it is below {CALM}")
    for line in missed:
        print(f"missed: {line}")
    print(json.dumps({"calm": calm, "cases": results}))
    return 1 if missed and calm else 0


if __name__ == "__main__":
    sys.exit(main())
