"""One fault at one moment, and all that must hold after it."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pipelinejob_worker.models.gpt import Gpt
from pipelinejob_worker.protocol import CHECKPOINT_DIRECTORY, Preset
from tests.e2e import kit, losses
from tests.e2e.chaos import verdict
from tests.e2e.chaos.catalog import Fault, Phase, Pods
from tests.e2e.chaos.lives import Lives, Loss, runs
from tests.e2e.chaos.scene import PRESET, Scene, pause, undisturbed_spec
from tests.e2e.chaos.watch import Pod

LAYER_BYTES = [12 * cost.parameters + 4096 for cost in Gpt(Preset(name="gpt", **PRESET)).costs]
"""Most state of each layer: its weights and two moments in float32, and what a file says beside them."""

REFERENCE_STEPS = 600
"""Undisturbed losses are computed for so many more steps when they are needed: a job of the tests makes fewer."""

CHECKPOINT_SECONDS = 30
LEAVING_SECONDS = 90
LEADING_SECONDS = 60
LEASE = "pipelinejob"
COUNTED_SECONDS = 30
LOOK_SECONDS = 0.002


@dataclass(frozen=True)
class Outcome:
    """What a fault has cost."""

    fault: str
    phase: str
    struck: str
    seconds: float
    """From the fault until all stages train again, each guarded."""

    repeated: int
    """Finished steps that were computed again."""

    def __str__(self) -> str:
        return (
            f"{self.fault:<22} {self.phase:<11} {self.struck:<14} settled after {self.seconds:5.1f} s, "
            f"{self.repeated} steps again"
        )


def strike(scene: Scene, fault: Fault, phase: Phase) -> Outcome:
    """Let a fault strike in a phase, wait for the recovery, and check what must hold.

    Raises AssertionError that says what does not.
    """
    before, incarnation, counted = scene.lives(), scene.incarnation(), scene.failures()
    staying = range(min(scene.shapes)) if phase == Phase.RESCALE else range(scene.stages)
    owners, pods = scene.owners(), fault.choose(scene, staying)
    struck = {pod.uid: fault.loss for pod in pods}
    bystander = PHASES[phase](scene, pods)
    if bystander:
        struck.setdefault(bystander.uid, Loss.WORKER)
    at, step = time.monotonic(), scene.watch.last_step()
    with fault.strike(scene, pods):
        for lives in before.values():
            _wait_for_end(lives, struck.get(lives.pod, Loss.NOTHING), fault.seconds)
        scene.wait_settled(fault.seconds, beyond=step + 1)
        settled = time.monotonic()
    outcome = Outcome(
        fault.name,
        phase,
        ",".join(str(stage) for stage, lives in before.items() if lives.pod in struck) or "-",
        settled - at,
        verdict.repeated_steps(scene.watch.sightings, incarnation),
    )
    allowed = fault.repeats + (bystander is not None)
    assert outcome.repeated <= allowed, f"{outcome}; allowed are {allowed}\n{scene.watch.describe()}"
    after = scene.owners()
    moved = [layer for layer, owner in owners.items() if after.get(layer) != owner]
    if phase == Phase.RESCALE:  # what a struck stage had been given already, the pod that replaces its own needs, too
        hit = {stage for stage, lives in before.items() if lives.pod in struck}
        replaced = {seen.pod.uid for stage, seen in scene.by_stage().items() if stage in hit}
        moved += [layer for layer in moved if after.get(layer) in replaced]
    fetched, most = verdict.fetched_bytes(scene.watch.sightings, at), sum(LAYER_BYTES[layer] for layer in moved)
    assert fetched <= most, f"{outcome}: {fetched} bytes were fetched; layers {moved}, which moved, have {most}"
    wrong = verdict.wrong_lives(before, scene.lives(), struck)
    wrong += verdict.wrong_losses(verdict.told_losses(scene.watch.sightings), undisturbed(scene.watch.last_step()))
    assert not wrong, "\n".join([str(outcome), *wrong[:20], scene.watch.describe()])
    _wait_for_pods(scene)
    _wait_for_operator()
    own = {pod.uid for pod in pods if fault.failure and fault.loss}
    failed = {stage: (lives.pod in own, bystander and lives.pod == bystander.uid) for stage, lives in before.items()}
    _wait_for_counters(scene, counted, {stage: sum(map(bool, both)) for stage, both in failed.items()})
    return outcome


def _wait_for_end(lives: Lives, loss: Loss, seconds: float) -> None:
    """Wait until what a fault ends has ended: until the kubelet has noticed, the job may train on."""
    identity = lives.worker if loss == Loss.WORKER else lives.agent
    if loss and identity:
        kit.wait_for(f"process {identity[0]} of pod {lives.pod} ends", lambda: not runs(identity), seconds)


# --- phases: each comes to its moment, and returns the pod that it has struck itself, if any --------------------


def _compute(scene: Scene, pods: Pods) -> Pod | None:
    """Somewhere within a step."""
    scene.wait_step()
    pause(scene.random.uniform(0.1, 0.9) * scene.step_seconds())
    return None


def _commit(scene: Scene, pods: Pods) -> Pod | None:
    """As soon as a step is told to be finished: snapshots are being taken and copied."""
    scene.wait_step()
    return None


def _checkpoint(scene: Scene, pods: Pods) -> Pod | None:
    """While a checkpoint is half written."""
    agent, _ = scene.lives()[0].agent
    directory = Path(f"/proc/{agent}/root{CHECKPOINT_DIRECTORY}")  # as the pod sees it, wherever that is mounted
    end = time.monotonic() + CHECKPOINT_SECONDS
    while not any(directory.glob("step-*.partial-*")):
        assert time.monotonic() < end, f"no checkpoint is written to {directory}"
        time.sleep(LOOK_SECONDS)
    return None


def _recovery(scene: Scene, pods: Pods) -> Pod | None:
    """While the job recovers from the kill of another stage's worker, or of the same one if all are struck."""
    others = [seen.pod for seen in scene.by_stage().values() if seen.pod not in pods]
    bystander = scene.random.choice(others or list(pods))
    scene.worker(bystander).end()
    assert scene.wait_disturbed(10), f"nobody has noticed that the worker of {bystander.name} was killed"
    pause(scene.random.uniform(0, 0.4))
    return bystander


def _rescale(scene: Scene, pods: Pods) -> Pod | None:
    """While the job is on the way to another number of stages."""
    (stages,) = set(scene.shapes) - {scene.stages}
    scene.rescale(stages)
    pause(scene.random.uniform(0, 1.5))
    return None


PHASES: Mapping[Phase, Callable[[Scene, Pods], Pod | None]] = {
    Phase.COMPUTE: _compute,
    Phase.COMMIT: _commit,
    Phase.CHECKPOINT: _checkpoint,
    Phase.RECOVERY: _recovery,
    Phase.RESCALE: _rescale,
}


def _wait_for_pods(scene: Scene) -> None:
    """See that the job has a pod for each stage and, when what is leaving has left, none beside."""
    job = scene.job
    kit.wait_for(
        f"{scene.stages} pods and no more",
        lambda: len(job.pods()) == scene.stages and job.status.get("readyStages") == scene.stages,
        LEAVING_SECONDS,
        job.describe,
    )


def _wait_for_operator() -> None:
    """See that one of the operator's pods leads: while none does, what happens to a pod is not seen, but told later."""

    def leads() -> bool:
        holder = kit.get("lease", LEASE, "-n", kit.OPERATOR_NAMESPACE)["spec"].get("holderIdentity") or ""
        pods = kit.get("pods", "-n", kit.OPERATOR_NAMESPACE)["items"]
        return any(holder.startswith(f"{pod['metadata']['name']}_") for pod in pods)

    kit.wait_for("an operator leads", leads, LEADING_SECONDS)


def _wait_for_counters(scene: Scene, before: Mapping[int, int], failed: Mapping[int, int]) -> None:
    """See that the status counts each failure for its stage, once.

    What two of one pod's failures have in common is its memory: with the pod goes the record of a worker's end.
    """

    def right() -> bool:
        now = scene.failures()
        stages = before.keys() & now.keys() & failed.keys()
        return all(min(failed[stage], 1) <= now[stage] - before[stage] <= failed[stage] for stage in stages)

    kit.wait_for(
        f"failures of stages {dict(failed)} are counted beside {dict(before)}",
        right,
        COUNTED_SECONDS,
        lambda: f"{scene.failures()}\n{scene.job.describe()}",
    )


@cache
def _undisturbed(steps: int) -> tuple[float, ...]:
    return losses.of_one_process(undisturbed_spec(), steps)


def undisturbed(steps: int) -> tuple[float, ...]:
    """Return the losses of at least so many steps of one process that nothing happens to."""
    return _undisturbed((steps // REFERENCE_STEPS + 1) * REFERENCE_STEPS)
