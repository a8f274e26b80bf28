"""Faults and phases: what can happen to a job, what may be lost by it, and when it strikes."""

import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from enum import StrEnum

from tests.cluster import faults
from tests.e2e import kit
from tests.e2e.chaos.lives import Loss
from tests.e2e.chaos.scene import CHECKPOINT_EVERY, Scene, Volume, pause
from tests.e2e.chaos.watch import Pod

Pods = Sequence[Pod]


@dataclass(frozen=True)
class Fault:
    """``strike`` does it to the pods that ``choose`` has named; inside its block the job has to recover."""

    name: str
    strike: Callable[[Scene, Pods], AbstractContextManager[None]]
    loss: Loss
    choose: Callable[[Scene, range], Pods]
    seconds: float = 40
    """Within which all stages train again, each guarded."""

    repeats: int = 1
    """Most finished steps that may be computed again."""

    volume: Volume = Volume.NONE
    """What it takes to recover."""

    failure: bool = True
    """Whether what ends has failed: a pod that is asked to leave has not."""


# --- whom a fault strikes: the second argument are the stages that may be struck ---------------------------------


def any_stage(scene: Scene, stages: range) -> Pods:
    """One stage."""
    return [scene.pod(scene.random.choice(stages))]


def neighbours(scene: Scene, stages: range) -> Pods:
    """Two stages with a link."""
    first = scene.random.choice(stages[:-1])
    return [scene.pod(first), scene.pod(first + 1)]


def all_stages(scene: Scene, stages: range) -> Pods:
    """All of them."""
    return [seen.pod for stage, seen in sorted(scene.by_stage().items())]


def stages_of_a_node(scene: Scene, stages: range) -> Pods:
    """The stages that share a node with one."""
    (chosen,) = any_stage(scene, stages)
    return [pod for pod in all_stages(scene, stages) if pod.node == chosen.node]


def no_stage(scene: Scene, stages: range) -> Pods:
    """None."""
    return []


# --- faults -----------------------------------------------------------------------------------------------------


@contextmanager
def kill_workers(scene: Scene, pods: Pods) -> Iterator[None]:
    """``kill -9``."""
    for pod in pods:
        scene.worker(pod).end(signal.SIGKILL)
    yield


@contextmanager
def segfault_workers(scene: Scene, pods: Pods) -> Iterator[None]:
    """As a bug in native code does it."""
    for pod in pods:
        scene.worker(pod).end(signal.SIGSEGV)
    yield


@contextmanager
def stop_worker(scene: Scene, pods: Pods) -> Iterator[None]:
    """A process that hangs; nobody lets it go on before the job has recovered."""
    with faults.stopped(scene.worker(pods[0])):
        yield


@contextmanager
def out_of_memory(scene: Scene, pods: Pods) -> Iterator[None]:
    """The kernel kills the whole container."""
    faults.out_of_memory(pods[0].uid)
    yield


@contextmanager
def kill_container(scene: Scene, pods: Pods) -> Iterator[None]:
    """Process 1 dies, and all others with it."""
    faults.kill_container(pods[0].uid)
    yield


@contextmanager
def kill_sandbox(scene: Scene, pods: Pods) -> Iterator[None]:
    """The pod's network goes. The kubelet asks its container to end, which hands over and leaves."""
    faults.kill_sandbox(pods[0].uid)
    yield


@contextmanager
def delete_pods(scene: Scene, pods: Pods) -> Iterator[None]:
    """A user, or an eviction: the pod may leave in good order."""
    kit.kubectl("delete", "pod", *(pod.name for pod in pods), "-n", scene.job.namespace.name, "--wait=false")
    yield


@contextmanager
def force_delete_pods(scene: Scene, pods: Pods) -> Iterator[None]:
    """The pod is gone at once, and so is its memory."""
    where = ("-n", scene.job.namespace.name)
    kit.kubectl("delete", "pod", *(pod.name for pod in pods), *where, "--grace-period=0", "--force")
    yield


@contextmanager
def kill_node(scene: Scene, pods: Pods) -> Iterator[None]:
    """Power failure of a node, which stays off until the job has recovered."""
    with faults.dead_node(pods[0].node):
        yield


@contextmanager
def drain_node(scene: Scene, pods: Pods) -> Iterator[None]:
    """Maintenance of a node, which stays closed until the job has recovered."""
    with faults.drained_node(pods[0].node):
        yield


CUT_SECONDS = 4.0
SLOW_SECONDS = 4.0
AWAY_SECONDS = 3.0

WATCHED_AGAIN_SECONDS = 60.0
WATCHES_OF_PODS = re.compile(r'apiserver_longrunning_requests\{.*resource="pods",scope="cluster".*verb="WATCH"')


@contextmanager
def cut_link(scene: Scene, pods: Pods) -> Iterator[None]:
    """No packet passes between two stages, until somebody has noticed or for some seconds."""
    with faults.cut(pods[0].address, pods[1].address):
        scene.wait_disturbed(CUT_SECONDS)
    yield


@contextmanager
def slow_link(scene: Scene, pods: Pods) -> Iterator[None]:
    """Little passes between two stages, in each direction: a step takes longer."""
    with faults.slow(pods[0].address, pods[1].address, "2mbit"):
        scene.wait_disturbed(SLOW_SECONDS)
    yield


@contextmanager
def kill_operator(scene: Scene, pods: Pods) -> Iterator[None]:
    """All replicas at once."""
    where = ("-n", kit.OPERATOR_NAMESPACE, "-l", "app.kubernetes.io/component=operator")
    kit.kubectl("delete", "pods", *where, "--grace-period=0", "--force")
    yield


@contextmanager
def restart_api_server(scene: Scene, pods: Pods) -> Iterator[None]:
    """It is killed and away for some seconds.

    The fault is over when all who watched pods do so again. Until then (half a minute, by client-go's back-off) a
    kubelet lets a deleted pod run on, whose new connections the network policy stops already: a second fault.
    """
    watches = _watches_of_pods()
    with faults.stopped_api_server():
        pause(AWAY_SECONDS)
    yield
    kit.wait_for(f"{watches} clients watch pods again", lambda: _watches_of_pods() >= watches, WATCHED_AGAIN_SECONDS)


def _watches_of_pods() -> int:
    """How many clients watch all pods, kubelets among them; none while the API server does not answer."""
    metrics = kit.kubectl("get", "--raw", "/metrics", check=False)
    return sum(int(line.split()[-1]) for line in metrics.splitlines() if WATCHES_OF_PODS.match(line))


@contextmanager
def fill_volume(scene: Scene, pods: Pods) -> Iterator[None]:
    """No checkpoint can be written; training goes on, and checkpoints do when there is space again."""
    assert isinstance(scene.volume, faults.SmallVolume)
    with scene.volume.filled():
        scene.job.wait("Checkpointed", "False", "CheckpointFailed", seconds=60)
    scene.job.wait("Checkpointed", "True", "Saved", seconds=60)
    yield


BY_CHECKPOINT = 2 * CHECKPOINT_EVERY + 1
"""Steps that a checkpoint may be old: one may be being written."""

FAULTS = (
    Fault("worker killed", kill_workers, Loss.WORKER, any_stage),
    Fault("worker segfault", segfault_workers, Loss.WORKER, any_stage),
    Fault("worker stopped", stop_worker, Loss.WORKER, any_stage),
    Fault("out of memory", out_of_memory, Loss.AGENT, any_stage, seconds=60),
    Fault("container killed", kill_container, Loss.AGENT, any_stage, seconds=60),
    Fault("sandbox killed", kill_sandbox, Loss.POD, any_stage, seconds=90, failure=False),
    Fault("pod deleted", delete_pods, Loss.POD, any_stage, seconds=90, failure=False),
    Fault("pod force-deleted", force_delete_pods, Loss.POD, any_stage, seconds=60),
    Fault("node dead", kill_node, Loss.POD, stages_of_a_node, seconds=120),
    Fault("node drained", drain_node, Loss.POD, stages_of_a_node, seconds=120, failure=False),
    Fault("link cut", cut_link, Loss.NOTHING, neighbours),
    Fault("link slow", slow_link, Loss.NOTHING, neighbours),
    Fault("operator killed", kill_operator, Loss.NOTHING, no_stage),
    Fault("API server restarted", restart_api_server, Loss.NOTHING, no_stage),
    Fault(
        *("two neighbours", force_delete_pods, Loss.POD, neighbours, 90),
        repeats=BY_CHECKPOINT,
        volume=Volume.SHARED,
    ),
    Fault(
        *("all stages", force_delete_pods, Loss.POD, all_stages, 90),
        repeats=BY_CHECKPOINT,
        volume=Volume.SHARED,
    ),
    Fault("disk full", fill_volume, Loss.NOTHING, no_stage, volume=Volume.SMALL),
)


class Phase(StrEnum):
    """What the job is doing when a fault strikes."""

    COMPUTE = "compute"
    COMMIT = "commit"
    CHECKPOINT = "checkpoint"
    RECOVERY = "recovery"
    RESCALE = "rescale"


def volume_of(fault: Fault, phase: Phase) -> Volume:
    """Return what a job needs for a fault in a phase, and nothing more."""
    if fault.volume == Volume.NONE and phase == Phase.CHECKPOINT:
        return Volume.SHARED
    return fault.volume
