"""Which messages a stage exchanges in a step, with whom and in which order. Pure.

Both ends of a link know both orders, so messages need no header: those from one stage to another arrive in the order
in which the sender computes them.
"""

from dataclasses import dataclass

from pipelinejob_worker.pipeline.schedule import Action, Pass, Schedule


@dataclass(frozen=True)
class Routes:
    """The messages of one stage; an action stands for the message that it needs or that it makes."""

    sends: dict[Action, int]
    """Actions whose result goes to another stage, and which."""

    receives: dict[Action, int]
    """Actions that need the message of another stage, and which."""

    incoming: dict[int, tuple[Action, ...]]
    """From each stage, the actions that need its messages, in the order in which these are sent."""

    acknowledges: dict[Action, int]
    """For an action that needs a message: how many of this stage's messages the sender had used when it sent it.

    Those have arrived, so they can be let go without waiting.
    """


def routes(schedule: Schedule, stage: int) -> Routes:
    """Derive the routes of ``stage`` from the orders of all stages."""
    sends = {action: peer for action in schedule.orders[stage] if (peer := _receiver(schedule, action)) is not None}
    receives = {action: peer for action in schedule.orders[stage] if (peer := _sender(schedule, action)) is not None}
    incoming: dict[int, tuple[Action, ...]] = {}
    acknowledges: dict[Action, int] = {}
    for peer in sorted(set(receives.values())):
        used, needing = 0, []
        for action in schedule.orders[peer]:
            used += _sender(schedule, action) == stage
            if _receiver(schedule, action) == stage:
                user = _user(schedule, action)
                needing.append(user)
                acknowledges[user] = used
        incoming[peer] = tuple(needing)
    return Routes(sends, receives, incoming, acknowledges)


def _receiver(schedule: Schedule, action: Action) -> int | None:
    """Stage that gets the result of ``action``, if it is another one."""
    if action.kind == Pass.WEIGHT:
        return None
    target = action.chunk + (1 if action.kind == Pass.FORWARD else -1)
    return _other_stage(schedule, action, target)


def _sender(schedule: Schedule, action: Action) -> int | None:
    """Stage whose message ``action`` needs, if it is another one."""
    if action.kind == Pass.WEIGHT:
        return None
    source = action.chunk - (1 if action.kind == Pass.FORWARD else -1)
    return _other_stage(schedule, action, source)


def _other_stage(schedule: Schedule, action: Action, chunk: int) -> int | None:
    if not 0 <= chunk < len(schedule.stage_of):
        return None
    stage = schedule.stage_of[chunk]
    return stage if stage != schedule.stage_of[action.chunk] else None


def _user(schedule: Schedule, action: Action) -> Action:
    """Return the action of the next chunk that uses what ``action`` makes."""
    if action.kind == Pass.FORWARD:
        return action._replace(chunk=action.chunk + 1)
    chunk = action.chunk - 1
    whole = action._replace(kind=Pass.BACKWARD, chunk=chunk)
    return whole if whole in schedule.index[schedule.stage_of[chunk]] else whole._replace(kind=Pass.INPUT)
