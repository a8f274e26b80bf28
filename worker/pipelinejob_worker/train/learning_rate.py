"""The learning rate as a function of the step: nothing to save, so a resumed or rescaled job needs none of it."""

import math

from pipelinejob_worker.protocol import Optimizer


def learning_rate(settings: Optimizer, step: int, total_steps: int) -> float:
    """Return the learning rate of step ``step``, counted from 0, of a job of ``total_steps``.

    It rises linearly and reaches ``learning_rate`` in the last step of the warm-up, or has it from the first step
    without one. From there it stays, or falls on a line or half a cosine (Loshchilov and Hutter 2017) to
    ``final_learning_rate``, which is that of the last step. A warm-up that lasts to the end leaves nothing to fall.
    """
    peak, final = float(settings.learning_rate), float(settings.final_learning_rate)
    if step + 1 < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    start, end = max(settings.warmup_steps - 1, 0), total_steps - 1
    if settings.decay == "Constant" or step <= start:
        return peak
    progress = (step - start) / (end - start)
    fallen = progress if settings.decay == "Linear" else (1 - math.cos(math.pi * progress)) / 2
    return peak * (1 - fallen) + final * fallen
