"""Which program a job's workers run, and what their zygote imports for it. Pure."""

from dataclasses import dataclass

from pipelinejob_worker.protocol import WorkerConfig

ENTRY = "pipelinejob_worker.train.worker:work"
"""Function that a forked worker calls with its link; what it returns is the exit code."""

HUGGING_FACE = "pipelinejob_worker.models.hugging_face"
SERVE = "pipelinejob_worker.serve.run"


@dataclass(frozen=True)
class Program:
    """``entry``: ``module:function``; ``preload``: modules that it would import only when it needs them."""

    entry: str
    preload: tuple[str, ...] = ()


def program_of(config: WorkerConfig, entry: str = "") -> Program:
    """Return what the job's workers run; ``entry`` replaces the program."""
    if entry:
        return Program(entry)
    needs = {HUGGING_FACE: config.model.hugging_face is not None, SERVE: config.mode != "Train"}
    return Program(ENTRY, tuple(module for module, needed in needs.items() if needed))
