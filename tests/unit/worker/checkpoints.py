"""A toy model's state at any step, and the ranks that save and load it."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import safetensors.torch
import torch

from pipelinejob_worker.protocol import Membership
from pipelinejob_worker.state.checkpoint import CheckpointStore, Written, global_names
from pipelinejob_worker.state.commit import Resumed, resume
from pipelinejob_worker.state.layout import Tensors
from pipelinejob_worker.state.saver import AsyncSaver

Result = TypeVar("Result")

NAMES = ("embedding", "blocks.0", "blocks.1", "blocks.2", "head")
FINGERPRINT = "toy seed=0"
PATIENCE_SECONDS = 30

_PARAMETERS = {"matrix": (3, 4), "bias": (4,), "scale": ()}
_KINDS = ("weight", "exp_avg", "exp_avg_sq")


def layer(index: int, step: int, pipeline: int = 0, pipelines: int = 1) -> dict[str, torch.Tensor]:
    """The state of a layer after ``step`` steps: the parameters that ``pipeline`` owns of it."""
    return {
        f"{kind}.{name}": torch.full(shape, 1000.0 * step + 100 * index + 10 * number + place)
        for place, kind in enumerate(_KINDS)
        for number, (name, shape) in enumerate(_PARAMETERS.items())
        if number % pipelines == pipeline
    }


SHAPES = {key: tuple(tensor.shape) for key, tensor in layer(0, 0).items()}


def same(read: Mapping[int, Tensors], step: int) -> bool:
    """Whether the layers are, whole and bit by bit, those after ``step`` steps."""
    expected = {index: layer(index, step) for index in read}
    return all(
        read[index].keys() == expected[index].keys()
        and all(torch.equal(read[index][key], tensor) for key, tensor in expected[index].items())
        for index in read
    )


def content_of(name: str, tensors: dict[str, torch.Tensor]) -> bytes:
    """The file of a layer."""
    return safetensors.torch.save(global_names(name, tensors))


def store(directory: Path, attempt: int = 0) -> CheckpointStore:
    """The checkpoints in a directory, for one incarnation of the toy job."""
    return CheckpointStore(directory, FINGERPRINT, attempt)


def save(to: CheckpointStore, step: int) -> None:
    """Save a checkpoint as a single rank, without a thread."""
    files = {name: to.write_layer(step, name, content_of(name, layer(index, step))) for index, name in enumerate(NAMES)}
    to.write_list(step, 0, Written(part=0, layers=files))
    to.publish(step, NAMES, ranks=1, extra={"goodSteps": step})


def read(from_: CheckpointStore, step: int) -> dict[int, dict[str, torch.Tensor]]:
    """A whole checkpoint, by layer."""
    manifest = from_.manifest(step)
    return {index: from_.read_layer(manifest, name, SHAPES) for index, name in enumerate(NAMES)}


def memberships(stages: int, pipelines: int = 1, port: int = 1) -> list[Membership]:
    """Those of all ranks, in the order of the ranks."""
    return [
        Membership(
            epoch=1,
            action="Run",
            stage=stage,
            stages=stages,
            pipeline=pipeline,
            pipelines=pipelines,
            master_address="127.0.0.1",
            master_port=port,
        )
        for pipeline in range(pipelines)
        for stage in range(stages)
    ]


def held(membership: Membership) -> range:
    """The layers of a stage: as equal shares as there can be."""
    stage, stages = membership.stage, membership.stages
    return range(stage * len(NAMES) // stages, (stage + 1) * len(NAMES) // stages)


def share(membership: Membership, step: int) -> dict[str, dict[str, torch.Tensor]]:
    """What a rank has to save after ``step`` steps."""
    return {NAMES[i]: layer(i, step, membership.pipeline, membership.pipelines) for i in held(membership)}


def shapes(membership: Membership) -> dict[int, dict[str, tuple[int, ...]]]:
    """What a rank has to load."""
    return dict.fromkeys(held(membership), SHAPES)


class Together:
    """All ranks as threads of this process, with the one collective that agreement needs."""

    def __init__(self, ranks: int) -> None:
        self._values: list[torch.Tensor] = []
        self._lock = threading.Lock()
        self._ranks = ranks
        self._barrier = threading.Barrier(ranks, timeout=PATIENCE_SECONDS)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks."""
        with self._lock:
            self._values.append(values)
        self._barrier.wait()
        total = torch.stack(self._values).sum(0, dtype=values.dtype)
        if self._barrier.wait() == 0:
            self._values.clear()
        self._barrier.wait()
        return total

    def all(self, *actions: Callable[[], Result]) -> list[Result]:
        """What every rank's action gives; they run at the same time."""
        with ThreadPoolExecutor(self._ranks) as pool:
            return list(pool.map(lambda action: action(), actions))


class Job:
    """All ranks of a job, in one process."""

    def __init__(self, directory: Path, stages: int, pipelines: int = 1, attempt: int = 0, keep: int = 2) -> None:
        self.memberships = memberships(stages, pipelines)
        self.together = Together(len(self.memberships))
        stores = [store(directory, attempt) for _ in self.memberships]
        self.resumed: list[Resumed] = self.together.all(
            *(
                lambda own=own, of=of: resume(own, of, self.together.sum, NAMES, shapes(of))
                for own, of in zip(stores, self.memberships, strict=True)
            )
        )
        self.savers = [
            AsyncSaver(own, of, NAMES, keep, resumed)
            for own, of, resumed in zip(stores, self.memberships, self.resumed, strict=True)
        ]

    def begin(self, step: int, first: Mapping[int, Callable[[], None]] | None = None) -> list[dict[str, Tensors]]:
        """Start to save; return what the ranks save. ``first``: what a rank does before it writes."""
        layers = [share(membership, step) for membership in self.memberships]
        for rank, saver in enumerate(self.savers):
            saver.begin(step, layers[rank], {"lossScale": 0.5, "goodSteps": step}, first=(first or {}).get(rank))
        return layers

    def vote(self) -> None:
        """What the savers do in a step."""
        total = [sum(codes) for codes in zip(*(saver.vote() for saver in self.savers), strict=True)]
        for saver in self.savers:
            saver.advance(total)

    def finish(self) -> None:
        """Wait until nothing is in flight."""
        self.together.all(*(lambda saver=saver: saver.finish(self.together.sum) for saver in self.savers))

    def save(self, step: int) -> None:
        """Save and wait."""
        self.begin(step)
        self.finish()

    @property
    def saved_step(self) -> int:
        """On all ranks the same."""
        (step,) = {saver.saved_step for saver in self.savers}
        return step

    @property
    def problem(self) -> str:
        """On all ranks the same."""
        (problem,) = {saver.problem for saver in self.savers}
        return problem
