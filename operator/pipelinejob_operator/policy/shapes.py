"""Shapes: which numbers of stages a job can have, and which it takes when there is no room for all of them."""

from pipelinejob_operator.api.v1alpha1 import Spec
from pipelinejob_operator.build.place import Shape
from pipelinejob_worker.protocol import Train

EXTRA_PARTS = 2
"""The embedding before a preset's blocks and the head after them can be stages of their own."""


def problem(spec: Spec, shape: Shape, layers: int = 0) -> str:
    """Say why the schedule or the model cannot be cut into ``shape``; empty where it can.

    The API server asks the same of ``spec.stages``; this is for shapes that the job takes by itself, and for models
    whose number of ``layers`` only the stages know (0: not yet).
    """
    if spec.train is None:
        return ""
    chunks = spec.train.schedule.chunks_per_stage
    if spec.partition.boundaries and len(spec.partition.boundaries) != shape.stages * chunks - 1:
        return f"spec.partition.boundaries cut the model for another number of stages than {shape.stages}"
    parts = spec.model.preset.layers + EXTRA_PARTS if spec.model.preset else layers
    if parts and parts < shape.stages * chunks:
        return f"the model has {parts} layers, {shape.stages} stages of {chunks} chunks need {shape.stages * chunks}"
    return _of_schedule(spec.train, shape)


def _of_schedule(train: Train, shape: Shape) -> str:
    name, microbatches = train.schedule.name, train.microbatches
    if microbatches % shape.pipelines:
        return f"{microbatches} microbatches cannot be shared equally by {shape.pipelines} pipelines"
    share = microbatches // shape.pipelines
    least = {"1F1B": shape.stages, "DualPipeV": 2 * shape.stages}.get(name, 1)
    if share < least:
        return f"schedule {name} on {shape.stages} stages needs {least} microbatches a pipeline, there are {share}"
    if name in ("Interleaved1F1B", "InterleavedZeroBubble") and share % shape.stages:
        return f"schedule {name} needs a multiple of the {shape.stages} stages as microbatches, there are {share}"
    return ""


def fewer(spec: Spec, present: Shape, pods: int, layers: int = 0) -> Shape | None:
    """Return the largest shape below ``present`` for which ``pods`` suffice; None where elasticity allows none."""
    least = spec.elasticity.min_stages
    if least is None:
        return None
    most = min(present.stages - 1, pods // present.pipelines)
    shapes = (Shape(stages, present.pipelines) for stages in range(most, least - 1, -1))
    return next((shape for shape in shapes if not problem(spec, shape, layers)), None)


def known_layers(ranges: list[str]) -> int:
    """How many layers the stages say that they hold together; ``ranges``: as in ``status.stages``, such as 0-2,9-11."""
    ends = [part.rpartition("-")[2] for text in ranges for part in text.split(",") if part]
    return 1 + max((int(end) for end in ends if end.isdigit()), default=-1)
