"""Where a stage pod stands: which stage of which pipeline, in a gang of a certain shape."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """How many stages a gang has, and how many pipelines of them: one pod for each stage of each pipeline."""

    stages: int
    pipelines: int = 1

    @property
    def size(self) -> int:
        """Pods of the gang: the world size."""
        return self.stages * self.pipelines

    def places(self) -> list["Place"]:
        """Return every place of the gang, by rank: the stages of pipeline 0, then those of pipeline 1, ..."""
        return [Place(stage, pipeline, self) for pipeline in range(self.pipelines) for stage in range(self.stages)]

    def __str__(self) -> str:
        """Render for messages: ``4 stages``, or ``2 pipelines of 4 stages``."""
        return f"{self.pipelines} pipelines of {self.stages} stages" if self.pipelines > 1 else f"{self.stages} stages"


@dataclass(frozen=True)
class Place:
    """One place of a gang."""

    stage: int
    pipeline: int
    shape: Shape

    @property
    def rank(self) -> int:
        """Number of the place in the whole gang, from 0."""
        return self.pipeline * self.shape.stages + self.stage

    def __str__(self) -> str:
        """Render for messages: ``stage 3``, or ``stage 3 of pipeline 1`` where there are several."""
        return f"stage {self.stage} of pipeline {self.pipeline}" if self.shape.pipelines > 1 else f"stage {self.stage}"
