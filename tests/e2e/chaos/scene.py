"""A job under test: its agents, its processes on the host, and the moments at which a fault may strike."""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from tests.cluster import faults, settings
from tests.cluster.faults import Process
from tests.e2e import kit
from tests.e2e.chaos.lives import Lives
from tests.e2e.chaos.watch import Incarnation, Pod, Sighting, Watch

MODEL_FILE = Path(__file__).with_name("slow.py")
PRESET: kit.Object = {"layers": 4, "width": 32, "heads": 2, "context": 32, "dropout": "0.1"}
LAYER_SECONDS = 0.02
CLAIM = "state"
SMALL_VOLUME = "16m"
START_SECONDS = 180
CHECKPOINT_EVERY = 5
ENDLESS = 1_000_000


class Volume(StrEnum):
    """Where checkpoints go."""

    NONE = "without checkpoints"
    SHARED = "with checkpoints"
    SMALL = "with checkpoints on a small volume"


SHAPES = {Volume.NONE: (3, 4), Volume.SHARED: (3, 4), Volume.SMALL: (1, 2)}


@dataclass
class Scene:
    """A job that trains until it is deleted, and its watch."""

    job: kit.Job
    watch: Watch
    stages: int
    shapes: tuple[int, int]
    """Numbers of stages between which it is rescaled."""

    random: random.Random
    volume: faults.SmallVolume | None = None
    """Where checkpoints go, if that is one."""

    guarded: bool = True
    """Whether each stage keeps a copy of another's state."""

    def by_stage(self) -> dict[int, Sighting]:
        """Return the newest sighting of each stage's agent that trains."""
        newest = sorted(self.watch.newest().values(), key=lambda seen: (seen.reached, seen.at))
        return {seen.status.stage: seen for seen in newest if seen.status.state not in ("Waiting", "Standby")}

    def pod(self, stage: int) -> Pod:
        """Return the pod of a stage."""
        return self.by_stage()[stage].pod

    def worker(self, pod: Pod) -> Process:
        """Return the process that trains in a pod; wait for it, if one has just ended."""
        found: Process = kit.wait_for(f"{pod.name} has a worker", lambda: faults.stage_processes(pod.uid).worker, 10)
        return found

    def lives(self) -> dict[int, Lives]:
        """Return who holds each stage."""
        return {stage: Lives.in_pod(seen.pod.uid) for stage, seen in self.by_stage().items()}

    def owners(self) -> dict[int, str]:
        """Return the UID of the pod that holds each layer."""
        owners: dict[int, str] = {}
        for seen in self.by_stage().values():
            for part in filter(None, seen.status.layers.split(",")):
                first, _, last = part.partition("-")
                owners |= dict.fromkeys(range(int(first), int(last or first) + 1), seen.pod.uid)
        return owners

    def failures(self) -> dict[int, int]:
        """Return how often each stage has failed, as the status says."""
        return {stage["index"]: stage.get("restarts", 0) for stage in self.job.status.get("stages", [])}

    def incarnation(self) -> Incarnation:
        """Return the newest life of the group that any agent has told of."""
        return max(seen.incarnation for seen in self.watch.newest().values())

    def wait_settled(self, seconds: float, beyond: int = 0) -> None:
        """Wait until all stages train in one incarnation, ``beyond`` a step, each guarded by another.

        That is when a further single failure must cost nothing, so the next fault may come.
        """

        def look() -> bool:
            seen = self.by_stage()
            return (
                seen.keys() == set(range(self.stages))
                and len({sighting.incarnation for sighting in seen.values()}) == 1
                and all(sighting.reached and sighting.step > beyond for sighting in seen.values())
                and (not self.guarded or self.stages == 1 or all(_guarded(sighting) for sighting in seen.values()))
            )

        try:
            self.watch.wait(f"{self.stages} stages train beyond step {beyond}, all guarded", look, seconds)
        except kit.Timeout as late:
            raise kit.Timeout(f"{late}\n{self.job.describe()}") from late

    def rescale(self, stages: int) -> None:
        """Ask for another number of stages, as users do."""
        self.stages = stages
        kit.kubectl("scale", f"pj/{self.job.name}", f"--replicas={stages}", "-n", self.job.namespace.name)

    def wait_step(self, seconds: float = 30) -> None:
        """Wait for the moment at which a step is told to be finished."""
        before = self.watch.last_step()
        self.watch.wait(f"step {before + 1}", lambda: self.watch.last_step() > before, seconds)

    def wait_disturbed(self, seconds: float) -> bool:
        """Wait until an agent has left the present incarnation, for so long at most; whether one has."""
        present = self.incarnation()

        def look() -> bool:
            return any(
                seen.incarnation > present or seen.status.state not in ("Running", "Draining")
                for seen in self.by_stage().values()
            )

        try:
            return self.watch.wait("an agent leaves its incarnation", look, seconds)
        except kit.Timeout:
            return False

    def step_seconds(self) -> float:
        """Return how long a step takes, as the agents measure it."""
        measured = [seen.status.progress.step_seconds for seen in self.by_stage().values()]
        return max((seconds for seconds in measured if seconds), default=0.5)


@contextmanager
def stage_a_job(namespace: kit.Namespace, volume: Volume, seed: object) -> Iterator[Scene]:
    """Start a job that trains without end, wait until it does, and delete it after the block."""
    rng = random.Random(str(seed))
    shapes = SHAPES[volume]
    stages = max(shapes) if volume == Volume.SMALL else rng.choice(shapes)
    checkpoint = {"checkpoint": {"volumeClaimName": CLAIM, "everySteps": CHECKPOINT_EVERY}}
    with _volume(namespace, volume) as small:
        job = kit.Job(namespace, "chaos", spec(stages) | (checkpoint if volume != Volume.NONE else {}))
        with watched(job) as watch:
            scene = Scene(job, watch, stages, shapes, rng, small)
            scene.wait_settled(START_SECONDS)
            yield scene


@contextmanager
def _volume(namespace: kit.Namespace, volume: Volume) -> Iterator[faults.SmallVolume | None]:
    """Claim what a job's checkpoints need; a small volume is one of each node, so its pods must share one."""
    if volume != Volume.NONE:
        namespace.claim(CLAIM, "ReadWriteOnce" if volume == Volume.SMALL else "ReadWriteMany")
    if volume != Volume.SMALL:
        yield None
        return
    claim = ("pvc", CLAIM, "-n", namespace.name)
    name = kit.wait_for("the claim is bound", lambda: kit.get(*claim)["spec"].get("volumeName"), 30)
    with faults.small_volume(name, SMALL_VOLUME) as small:
        yield small


@contextmanager
def watched(job: kit.Job) -> Iterator[Watch]:
    """Run a job during the block, and watch it; see that it leaves nothing behind."""
    namespace = job.namespace
    namespace.apply(
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "model"},
            "data": {MODEL_FILE.name: MODEL_FILE.read_text()},
        }
    )
    with Watch.of(job) as watch:
        job.create()
        yield watch
    uids = {seen.pod.uid for seen in watch.sightings}
    job.delete()
    kit.wait_for("no pod is left", lambda: not job.pods(), 90, job.describe)
    kit.wait_for("the nodes keep nothing of its pods", lambda: not _kept(uids), 60, lambda: str(_kept(uids)))


def spec(
    stages: int,
    *,
    layers: int = PRESET["layers"],
    layer_seconds: float = LAYER_SECONDS,
    ballast: int = 0,
    **members: kit.Object,
) -> kit.Object:
    """Return a job that trains without end on layers that sleep; ``members`` replace parts of the spec."""
    template = kit.template(env={"PYTHONPATH": "/model"})
    template["spec"]["containers"][0]["volumeMounts"].append({"name": "model", "mountPath": "/model"})
    template["spec"]["volumes"].append({"name": "model", "configMap": {"name": "model"}})
    arguments = {**PRESET, "name": "gpt", "layers": layers, "seconds": layer_seconds, "ballast": ballast}
    told = kit.spec(stages, ENDLESS, template=template)
    return {
        **told,
        "model": {
            "module": {
                "function": f"{MODEL_FILE.stem}:build",
                "arguments": [{"name": name, "value": str(value)} for name, value in arguments.items()],
            }
        },
        "partition": {"strategy": "Even"},
        "recovery": {"strategy": "Ladder", "snapshotEverySteps": 1, "maxRestarts": 1000},
        "elasticity": {"minStages": 1, "maxStages": 6},
        **members,
    }


def undisturbed_spec() -> kit.Object:
    """Return the same job on the preset itself, for one process that does not sleep."""
    return {**kit.spec(1, ENDLESS), "model": {"preset": {"name": "gpt", **PRESET}}}


def _guarded(seen: Sighting) -> bool:
    protection = seen.status.protection
    return not protection.problem and protection.guarded_step >= seen.step - 1


def _kept(pod_uids: set[str]) -> list[Path]:
    """What the kubelets still keep of pods: volumes in memory are below."""
    return [path for path in settings.STATE.glob("node-*/kubelet/pods/*") if path.name in pod_uids]


def pause(seconds: float) -> None:
    """Let an offset within a phase pass: when to strike is what the seed decides, so there is nothing to look for."""
    time.sleep(seconds)
