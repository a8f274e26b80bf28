"""Faults, rescaling and snapshots on the cluster, beside what JobSet does: ``make bench-recovery``.

Seconds are from the fault to the next finished step, as the agents tell it when asked twenty times a second; steps lost
are finished steps that were computed again; detection is from a node's death until Kubernetes says so, to the second.
``RecreateAll`` recreates every pod and resumes from a checkpoint, which is what peers do. Only on a calm machine do the
numbers mean something.
"""

import json
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import pairwise
from typing import Any, NamedTuple

from pipelinejob_worker.agent.program import ENTRY
from tests.e2e import kit
from tests.e2e.chaos import catalog, verdict
from tests.e2e.chaos.scene import CLAIM, Scene, spec, watched
from tests.e2e.chaos.watch import Incarnation
from tests.e2e.conftest import TEXT, install_anew
from tools.bench import moving, warmth

STAGES = 4
START_SECONDS = 240
RECOVERY_SECONDS = 180

FAULTS = (
    ("worker killed", "worker killed", 0, 3),
    ("worker stopped", "worker stopped", 0, 3),
    ("container killed", "container killed", 0, 3),
    ("pod deleted", "pod force-deleted", 0, 3),
    ("node dead", "node dead", 0, 1),
    ("pod deleted, with a spare", "pod force-deleted", 1, 3),
    ("node dead, with a spare", "node dead", 1, 1),
)
"""What is told, the fault in the catalog, spares of the job, how often."""

CHECKPOINT = {"volumeClaimName": CLAIM, "everySteps": 50}
"""Of RecreateAll, at the API's default interval. The ladder has none."""

WALK = (2, 3, 4)
"""Numbers of stages, one after another, from STAGES on."""

LARGE = {"layers": 10, "ballast": 6_000_000}
"""A model of 12 layers with 72 MB of weights and moments each: on four stages at least 200 MB a stage."""

LARGE_LAYER_BYTES = 72_000_000
WARM_GIGABYTES = 4
"""More than pods and workers take anew in one change of the number of stages."""

LONG_STEP_SECONDS = 5.0
LONG_LAYER_SECONDS = LONG_STEP_SECONDS / (3 * (STAGES + 4 - 1))
"""With 4 microbatches, 3 layers a stage, and no time for anything but sleeping."""

LONG_STEPS, STARTING_STEPS = 8, 2

MOVED = '"event": "pieces are here"'

UNANSWERED = {("worker stopped", "RecreateAll")}
"""What a strategy does not answer: whoever only looks at pods sees none that has ended."""

IMPORTED = ENTRY.partition(":")[0]

Json = dict[str, Any]


@contextmanager
def training(name: str, strategy: str, *, spares: int = 0, **members: Any) -> Iterator[Scene]:
    """Run a job in a namespace of its own until it trains; ``members`` are those of ``scene.spec``."""
    ladder = strategy == "Ladder"
    recovery = {"strategy": strategy, "maxRestarts": 1000}
    recovery |= {"snapshotEverySteps": 1, "spares": spares} if ladder else {}
    with kit.namespace(f"bench-{name}") as namespace:
        namespace.text("text", TEXT)
        namespace.claim(CLAIM)
        job = kit.Job(namespace, "bench", spec(STAGES, recovery=recovery, **members))
        with watched(job) as watch:
            scene = Scene(job, watch, STAGES, (STAGES, STAGES), random.Random(0), guarded=ladder)  # noqa: S311 - which stage is hit
            scene.wait_settled(START_SECONDS)
            yield scene


def measure_faults(strategy: str, spares: int) -> list[Json]:
    """Strike one job with faults one after another; ``seconds`` is null for what is not recovered from in time."""
    checkpoint = {} if strategy == "Ladder" else {"checkpoint": CHECKPOINT}
    results: list[Json] = []
    with training(f"{strategy.lower()}-{spares}", strategy, spares=spares, **checkpoint) as scene:
        for told, name, needed, repeats in FAULTS:
            if needed != spares:
                continue
            (fault,) = (fault for fault in catalog.FAULTS if fault.name == name)
            result: Json = {"fault": told, "strategy": strategy}
            runs = [_strike(scene, fault, spares) for _ in range(1 if (name, strategy) in UNANSWERED else repeats)]
            if seconds := [run.seconds for run in runs if run.seconds is not None]:
                lost = statistics.median(run.steps_lost for run in runs)
                result |= {"seconds": round(statistics.median(seconds), 2), "steps_lost": lost}
                cost = f"{result['seconds']:>8.2f} s{lost:>8g} steps lost"
            else:
                result |= {"seconds": None, "steps_lost": None}
                cost = f"not within {RECOVERY_SECONDS} s"
            if detected := [run.detected for run in runs if run.detected is not None]:
                result["detection_seconds"] = statistics.median(detected)
                cost += f", detected after {result['detection_seconds']:.0f} s"
            print(f"{told:<28}{strategy:<14}{cost}", flush=True)
            results.append(result)
    return results


class Run(NamedTuple):
    """What one strike has cost; ``detected`` is for a node's death."""

    seconds: float | None
    steps_lost: int
    detected: float | None


def _strike(scene: Scene, fault: catalog.Fault, spares: int) -> Run:
    """Strike as a step has just been finished."""
    scene.wait_settled(START_SECONDS, beyond=scene.watch.last_step() + 1)
    scene.watch.wait(f"{spares} spares wait", lambda: len(scene.watch.newest()) >= STAGES + spares, START_SECONDS)
    scene.wait_step()
    before = scene.incarnation()
    pods = fault.choose(scene, range(1, scene.stages))
    at, wall = time.monotonic(), time.time()
    with fault.strike(scene, pods):
        try:
            finished = scene.watch.wait(
                f"a step is finished after: {fault.name}",
                lambda: verdict.first_step_after(scene.watch.sightings, before),
                RECOVERY_SECONDS,
            )
        except kit.Timeout:
            if (fault.name, scene.job.spec["recovery"]["strategy"]) not in UNANSWERED:
                raise
            return Run(None, 0, None)
        detected = _not_ready_since(pods[0].node) - wall if fault.name == "node dead" else None
    assert finished is not None
    return Run(finished - at, verdict.repeated_steps(scene.watch.sightings, before), detected)


def _not_ready_since(node: str) -> float:
    """Unix time at which Kubernetes took a node for lost."""
    (ready,) = (each for each in kit.get("node", node)["status"]["conditions"] if each["type"] == "Ready")
    assert ready["status"] != "True", f"{node} is Ready"
    return datetime.fromisoformat(ready["lastTransitionTime"]).timestamp()


def measure_import() -> float:
    """Seconds in which a pod's Python imports what a worker needs: a new container's floor; median of three."""
    command = f"import time; at = time.perf_counter(); import {IMPORTED}; print(time.perf_counter() - at)"
    with training("import", "Ladder") as scene:
        pod, namespace = scene.pod(0).name, scene.job.namespace.name
        runs = [float(kit.kubectl("exec", pod, "-n", namespace, "--", "python3", "-c", command)) for _ in range(3)]
    print(f"import of {IMPORTED}: {statistics.median(runs):.2f} s, while the job trains", flush=True)
    return statistics.median(runs)


def measure_rescale(name: str, warm_gigabytes: int = 0, **model: int) -> list[Json]:
    """Walk through numbers of stages; a pause is the time between two steps without that of a step.

    In a pause layers move, and then they are loaded, and what the new split needs is allocated in the first step; the
    rate is of the moving alone. ``warm_gigabytes`` of free memory are warm when a change begins.
    """
    results = []
    with training(name, "Ladder", **model) as scene:
        for stages in WALK:
            begun, before, owners = scene.stages, scene.incarnation(), scene.owners()
            if warm_gigabytes:
                with warmth.held(warm_gigabytes):
                    scene.rescale(stages)
                    _wait_for_new_pods(scene, stages)
            else:
                scene.rescale(stages)
            between = _pause(scene, before)
            scene.wait_settled(START_SECONDS, beyond=scene.watch.last_step() + 1)
            pause = between - scene.step_seconds()
            moved = sum(owner != owners[layer] for layer, owner in scene.owners().items())
            result: Json = {"from": begun, "to": stages, "pause_seconds": round(pause, 2)}
            if model:
                moving = _moving_seconds(scene)
                rate = round(moved * LARGE_LAYER_BYTES / 1e6 / moving)
                result |= {"moving_seconds": moving, "megabytes_per_second": rate, "warm": bool(warm_gigabytes)}
            print(f"{begun} to {stages} stages {name}: {pause:.2f} s, {moved} layers moved {result}", flush=True)
            results.append(result)
    return results


def _wait_for_new_pods(scene: Scene, stages: int) -> None:
    """Wait until pods for so many stages have their imports behind them: the change begins then."""
    if stages > len(scene.by_stage()):
        kit.wait_for(
            f"{stages} pods are ready",
            lambda: kit.kubectl("get", "pods", "-n", scene.job.namespace.name).count("1/1") >= stages,
            START_SECONDS,
        )


def _moving_seconds(scene: Scene) -> float:
    """How long the newest move of layers has taken the slowest agent, as the agents log it."""
    told = []
    for seen in scene.by_stage().values():  # others are on their way out
        for line in kit.kubectl("logs", seen.pod.name, "-n", scene.job.namespace.name).splitlines():
            if MOVED in line:
                record = json.loads(line)
                told.append((record["step"], record["seconds"]))
    return float(max(told)[1])


def _pause(scene: Scene, before: Incarnation) -> float:
    """Seconds from the last step before a change to the first one after it, for which this waits."""
    sightings = scene.watch.sightings
    finished = scene.watch.wait(
        "a step is finished by the new stages", lambda: verdict.first_step_after(sightings, before), START_SECONDS
    )
    assert finished is not None
    return finished - max(verdict.step_times(seen for seen in sightings if seen.incarnation <= before).values())


def measure_moving() -> Json:
    """Megabytes a second that one and two receivers get with nothing beside them: at most this is a rescale's rate.

    In a job the workers build their new layers at the same time, and here on the same cores.
    """
    rates = {str(count): round(moving.measure(count, LARGE_LAYER_BYTES) / 1e6) for count in (1, 2)}
    print(f"layers moved with nothing beside it, by receivers: {rates} MB/s", flush=True)
    return rates


def measure_overhead() -> float:
    """Return what a snapshot and a copy at every step add to steps that sleep, as a share of them."""
    with_snapshots, without = (_step_seconds(strategy) for strategy in ("Ladder", "RecreateAll"))
    print(f"step {without:.3f} s, with a snapshot and a copy {with_snapshots:.3f} s", flush=True)
    return with_snapshots / without - 1


def _step_seconds(strategy: str) -> float:
    name = f"overhead-{strategy.lower()}"
    with training(name, strategy, layer_seconds=LONG_LAYER_SECONDS, **LARGE) as scene:
        last = scene.watch.last_step() + STARTING_STEPS + LONG_STEPS
        scene.watch.wait(f"step {last}", lambda: scene.watch.last_step() >= last, START_SECONDS)
        times = sorted(verdict.step_times(scene.watch.sightings).values())
        return statistics.mean(later - earlier for earlier, later in list(pairwise(times))[-LONG_STEPS:])


def main() -> None:
    """Measure all, and print the JSON line."""
    first_touch = warmth.first_touch()  # before anything gives memory back
    install_anew()
    import_seconds = measure_import()
    faults = [
        *measure_faults("Ladder", 0),
        *measure_faults("Ladder", 1),
        *measure_faults("RecreateAll", 0),
    ]
    rescale = [
        *measure_rescale("tiny"),
        *measure_rescale("large", **LARGE),
        *measure_rescale("large-warm", WARM_GIGABYTES, **LARGE),
    ]
    told = {"faults": faults, "rescale": rescale, "snapshot_overhead": round(measure_overhead(), 4)}
    bounds = {
        "import_seconds": round(import_seconds, 2),
        "moving_alone": measure_moving(),
        "first_touch": first_touch,
    }
    print(json.dumps({**told, **bounds}))


if __name__ == "__main__":
    main()
