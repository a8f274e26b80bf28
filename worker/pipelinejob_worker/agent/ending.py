"""Why an agent ends: the exit code and the termination message. Pure."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from pipelinejob_worker.link import Failed
from pipelinejob_worker.protocol import TERMINATION_LIMIT_BYTES, ExitCode, Progress, Termination

MESSAGE_CHARACTERS = 1024

TIMINGS_BYTES = 1536
"""Most that the stages' timings may take of the termination message: the rest is for the log."""


@dataclass(frozen=True)
class Ending:
    """Exit code, CamelCase reason and one line for humans."""

    code: int
    reason: str
    message: str


def of_worker(code: int, failure: Failed | None, progress: Progress) -> Ending:
    """Return what the end of the worker process means.

    ``code`` is its exit code, negative for a signal; ``failure`` what it told before, if it could;
    ``progress`` how far it was: a process that exits with 0 before its last step has not succeeded.
    """
    if code < 0:
        name = signal.Signals(-code).name
        cause = "; the kernel does that when memory is out" if -code == signal.SIGKILL else ""
        return Ending(128 - code, "Signal", f"the worker process was killed by {name}{cause}")
    if failure:
        return Ending(code, failure.reason, failure.message)
    if code == ExitCode.DRAINED:
        return Ending(code, "Drained", f"stopped after step {progress.step} as asked")
    if code != ExitCode.SUCCEEDED:
        return Ending(code, "Error", f"the worker process exited with code {code}")
    untold = progress.total_steps == 0 and progress.serving is None  # of a file only stage 0 knows the length
    if untold or progress.step < progress.total_steps:
        return Ending(
            1,
            "Error",
            f"the worker process exited with code 0 after step {progress.step} of {progress.total_steps}",
        )
    done = f"all {progress.total_steps} steps are done" if progress.total_steps else "all is done"
    return Ending(code, "Succeeded", done)


def termination(stage: int, ending: Ending, progress: Progress, tail: Sequence[str]) -> bytes:
    """Render the termination message within its limit.

    What does not fit is dropped: timings that leave no room for the log, then the oldest lines of ``tail``, then the
    ends of the long texts.
    """
    if sum(len(timing.to_json().encode()) for timing in progress.stages) > TIMINGS_BYTES:
        progress = progress.model_copy(update={"stages": ()})
    message, problem, lines = ending.message[:MESSAGE_CHARACTERS], progress.checkpoint_problem, list(tail)
    while True:
        rendered = Termination(
            stage=stage,
            exit_code=ending.code,
            reason=ending.reason,
            message=message,
            step=progress.step,
            progress=progress.model_copy(update={"checkpoint_problem": problem}),
            log_tail=lines,
        )
        content = rendered.to_json().encode()
        if len(content) <= TERMINATION_LIMIT_BYTES:
            return content
        if lines:
            lines.pop(0)
        elif len(message) >= len(problem):
            message = message[: len(message) // 2]
        else:
            problem = problem[: len(problem) // 2]
