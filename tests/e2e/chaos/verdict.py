"""What must hold of a job's sightings, whatever has happened to it. Pure."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from tests.e2e.chaos.lives import Lives, Loss
from tests.e2e.chaos.watch import Incarnation, Sighting


def told_losses(sightings: Iterable[Sighting]) -> dict[int, set[float]]:
    """Return the losses that any agent has told of each finished step."""
    told: dict[int, set[float]] = defaultdict(set)
    for seen in sightings:
        progress = seen.status.progress
        if progress.step and progress.loss is not None:
            told[progress.step].add(progress.loss)
    return dict(told)


def wrong_losses(told: Mapping[int, set[float]], expected: Sequence[float]) -> list[str]:
    """Return what is wrong: steps of whose loss nothing is known, and bits that are not the expected ones."""
    wrong = []
    for step in range(1, max(told, default=0) + 1):
        losses, right = told.get(step, set()), expected[step - 1]
        if not losses:
            wrong.append(f"step {step}: no agent has told its loss")
        elif losses != {right}:
            wrong.append(f"step {step}: {sorted(loss.hex() for loss in losses)}, undisturbed {right.hex()}")
    return wrong


def repeated_steps(sightings: Sequence[Sighting], before: Incarnation) -> int:
    """Return how many finished steps were computed again after incarnation ``before``, as the agents' steps show."""
    done = max((seen.step for seen in sightings if seen.incarnation <= before), default=0)
    resumed = [seen.step for seen in sightings if seen.incarnation > before and seen.reached]
    return max(0, done - min(resumed, default=done))


def first_step_after(sightings: Iterable[Sighting], before: Incarnation) -> float | None:
    """Return when the first step was finished in an incarnation after ``before``, on the monotonic clock."""
    resumed: dict[Incarnation, int] = {}
    for seen in sightings:
        if seen.incarnation > before and seen.reached:
            start = resumed.setdefault(seen.incarnation, seen.step)
            if seen.step > start:
                return seen.at
    return None


def step_times(sightings: Iterable[Sighting]) -> dict[int, float]:
    """Return when each step was first told to be finished, on the monotonic clock."""
    times: dict[int, float] = {}
    for seen in sightings:
        if seen.reached:
            times.setdefault(seen.step, seen.at)
    return times


def fetched_bytes(sightings: Iterable[Sighting], since: float) -> int:
    """Return the bytes of state that pods have taken over from others since a time on the monotonic clock.

    An agent counts from its own start.
    """
    newest: dict[str, int] = {}
    fetched = 0
    for seen in sightings:
        now, before = seen.status.traffic.pieces_fetched_bytes, newest.get(seen.pod.uid, 0)
        if seen.at > since:
            fetched += now - before if now >= before else now
        newest[seen.pod.uid] = now
    return fetched


def wrong_lives(before: Mapping[int, Lives], after: Mapping[int, Lives], struck: Mapping[str, Loss]) -> list[str]:
    """Return what has ended that should not have, and what has not: ``struck`` says by pod UID what a fault ends.

    A stage that a rescale has made or ended is not looked at.
    """
    wrong = []
    for stage in before.keys() & after.keys():
        expected, lost = struck.get(before[stage].pod, Loss.NOTHING), before[stage].lost(after[stage])
        if lost != expected:
            wrong.append(f"stage {stage}: {lost.name} has ended, should have: {expected.name}")
    return wrong
