"""Where the model is cut, kept from one incarnation to the next, so that layers stay where they are. Pure."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from pipelinejob_worker.protocol.base import Wire
from pipelinejob_worker.recovery.pieces import MAX_LAYERS

MAX_CHUNKS = 16 * 1024

Layers = Annotated[int, Field(ge=0, le=MAX_LAYERS)]


class Cut(Wire):
    """The layers of each chunk, and what they were found to promise, for one shape of the group."""

    stages: int = Field(ge=1, le=65_536)
    pipelines: int = Field(ge=1, le=65_536)
    stage_of: tuple[int, ...] = Field(min_length=1, max_length=MAX_CHUNKS, description="Stage of each chunk.")
    ends: tuple[Layers, ...] = Field(
        min_length=1, max_length=MAX_CHUNKS, description="One past the last layer of each chunk."
    )
    seconds: float = Field(0.0, description="Predicted time of a step.")
    bubble: float = Field(0.0, description="Predicted idle share.")

    @property
    def chunks(self) -> list[range]:
        """The layers of each chunk."""
        return [range(start, end) for start, end in zip((0, *self.ends), self.ends, strict=False)]

    def needs(self) -> Mapping[int, list[int]]:
        """Return the layers that each rank needs."""
        of_stage: list[list[int]] = [[] for _ in range(self.stages)]
        for stage, layers in zip(self.stage_of, self.chunks, strict=True):
            of_stage[stage] += layers
        return {rank: of_stage[rank % self.stages] for rank in range(self.stages * self.pipelines)}
