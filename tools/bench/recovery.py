"""Faults, rescaling and snapshots on the cluster, beside what JobSet does: ``make bench-recovery``.

Seconds are from the fault to the next finished step, as the agents tell it when asked twenty times a second; steps lost
are finished steps that were computed again. ``RecreateAll`` recreates every pod and resumes from a checkpoint, which is
what peers do. Only on a calm machine do the numbers mean something.
"""

import json
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from tests.e2e import kit
from tests.e2e.chaos import catalog, verdict
from tests.e2e.chaos.scene import CLAIM, Scene, spec, watched
from tests.e2e.chaos.watch import Incarnation
from tests.e2e.conftest import TEXT, install_anew

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
LONG_STEP_SECONDS = 5.0
LONG_LAYER_SECONDS = LONG_STEP_SECONDS / (3 * (STAGES + 4 - 1))
"""With 4 microbatches, 3 layers a stage, and no time for anything but sleeping."""

LONG_STEPS, STARTING_STEPS = 8, 2

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
    """Strike one job with faults one after another."""
    checkpoint = {} if strategy == "Ladder" else {"checkpoint": CHECKPOINT}
    results = []
    with training(f"{strategy.lower()}-{spares}", strategy, spares=spares, **checkpoint) as scene:
        for told, name, needed, repeats in FAULTS:
            if needed != spares:
                continue
            (fault,) = (fault for fault in catalog.FAULTS if fault.name == name)
            runs = [_strike(scene, fault, spares) for _ in range(repeats)]
            seconds, lost = (statistics.median(column) for column in zip(*runs, strict=True))
            results.append({"fault": told, "strategy": strategy, "seconds": round(seconds, 2), "steps_lost": lost})
            print(f"{told:<28}{strategy:<14}{seconds:>8.2f} s{lost:>8g} steps lost", flush=True)
    return results


def _strike(scene: Scene, fault: catalog.Fault, spares: int) -> tuple[float, int]:
    """Strike as a step has just been finished; return seconds to the next one, and finished steps lost."""
    scene.wait_settled(START_SECONDS, beyond=scene.watch.last_step() + 1)
    scene.watch.wait(f"{spares} spares wait", lambda: len(scene.watch.newest()) >= STAGES + spares, START_SECONDS)
    scene.wait_step()
    before = scene.incarnation()
    pods = fault.choose(scene, range(1, scene.stages))
    at = time.monotonic()
    with fault.strike(scene, pods):
        finished = scene.watch.wait(
            f"a step is finished after: {fault.name}",
            lambda: verdict.first_step_after(scene.watch.sightings, before),
            RECOVERY_SECONDS,
        )
        assert finished is not None
    return finished - at, verdict.repeated_steps(scene.watch.sightings, before)


def measure_rescale(name: str, **model: int) -> list[Json]:
    """Walk through numbers of stages; a pause is the time between two steps without that of a step."""
    results = []
    with training(name, "Ladder", **model) as scene:
        for stages in WALK:
            begun, before, owners = scene.stages, scene.incarnation(), scene.owners()
            scene.rescale(stages)
            scene.wait_settled(START_SECONDS, beyond=scene.watch.last_step() + 1)
            pause = _pause(scene, before) - scene.step_seconds()
            moved = sum(owner != owners[layer] for layer, owner in scene.owners().items())
            result = {"from": begun, "to": stages, "pause_seconds": round(pause, 2)}
            if model:
                result |= {"megabytes_per_second": round(moved * LARGE_LAYER_BYTES / 1e6 / pause)}
            print(f"{begun} to {stages} stages {name}: {pause:.2f} s, {moved} layers moved {result}", flush=True)
            results.append(result)
    return results


def _pause(scene: Scene, before: Incarnation) -> float:
    sightings = scene.watch.sightings
    finished = verdict.first_step_after(sightings, before)
    assert finished is not None
    return finished - max(verdict.step_times(seen for seen in sightings if seen.incarnation <= before).values())


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
    install_anew()
    faults = [
        *measure_faults("Ladder", 0),
        *measure_faults("Ladder", 1),
        *measure_faults("RecreateAll", 0),
    ]
    rescale = [*measure_rescale("tiny"), *measure_rescale("large", **LARGE)]
    print(json.dumps({"faults": faults, "rescale": rescale, "snapshot_overhead": round(measure_overhead(), 4)}))


if __name__ == "__main__":
    main()
