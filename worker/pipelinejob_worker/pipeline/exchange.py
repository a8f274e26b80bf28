"""Messages between stages: hidden states down the chain of chunks, their gradients up."""

from collections import deque
from dataclasses import dataclass

import torch
from torch import distributed

from pipelinejob_worker.pipeline.group import Group
from pipelinejob_worker.pipeline.routes import Routes
from pipelinejob_worker.pipeline.schedule import Action, Pass, Schedule
from pipelinejob_worker.pipeline.stage import check_hidden
from pipelinejob_worker.pipeline.timeline import Activity, Timeline

RECEIVES_AHEAD = 2
"""Messages of each stage for which a buffer is ready before they are needed, so that they travel meanwhile."""


@dataclass(frozen=True)
class Boundary:
    """What passes between two chunks, on the meta device."""

    hidden: torch.Tensor
    positions: torch.Tensor | None
    """Set when samples hold several documents: it then follows the hidden state down the chain."""


class Exchange:
    """Sends and receives one step's messages; never waits for a send before the step's end.

    A message is sent as it is, without a copy, and must not change until it has arrived. It is kept alive until the
    receiver's own messages prove that it has used it (``Routes.acknowledges``).
    """

    def __init__(self, group: Group, boundary: Boundary, schedule: Schedule, timeline: Timeline) -> None:
        """Collective over all ranks where the backend needs links of its own."""
        self._group = group
        self._boundary = boundary
        self._timeline = timeline
        self._links = _links(group, schedule)

    def begin_step(self, routes: Routes) -> None:
        """Prepare to receive the first messages of a step."""
        self._routes = routes
        self._waiting = {peer: deque(actions) for peer, actions in routes.incoming.items()}
        self._posted: dict[Action, list[tuple[distributed.Work, torch.Tensor]]] = {}
        self._sent: dict[int, deque[list[tuple[distributed.Work, torch.Tensor]]]] = {}
        self._released = dict.fromkeys(set(routes.sends.values()), 0)
        for peer in self._waiting:
            for _ in range(RECEIVES_AHEAD):
                self._post(peer)

    def receive(self, action: Action) -> list[torch.Tensor]:
        """Wait for the message that ``action`` needs: a hidden state (and positions), or a gradient."""
        peer = self._routes.receives[action]
        while action not in self._posted:  # messages that are used later have come before it
            self._post(peer)
        with self._timeline.measure(Activity.WAITING, action.microbatch, action.chunk), self._group.waiting():
            parts = self._posted.pop(action)
            for work, _ in parts:
                work.wait()
        self._post(peer)
        self._release(peer, self._routes.acknowledges[action])
        return [tensor for _, tensor in parts]

    def send(self, action: Action, *parts: torch.Tensor) -> None:
        """Send what ``action`` has made. Raises ConfigurationError when it is not what the receiver expects."""
        peer = self._routes.sends[action]
        with self._timeline.measure(Activity.SENDING, action.microbatch, action.chunk):
            check_hidden(f"chunk {action.chunk}", parts[0], self._boundary.hidden)
            works = [self._isend(part.contiguous(), peer) for part in parts]
        self._sent.setdefault(peer, deque()).append(works)

    def finish_step(self) -> None:
        """Wait until all messages have arrived."""
        with self._timeline.measure(Activity.SENDING), self._group.waiting():
            for messages in self._sent.values():
                for parts in messages:
                    for work, _ in parts:
                        work.wait()
        self._sent.clear()

    def _post(self, peer: int) -> None:
        if not self._waiting[peer]:
            return
        action = self._waiting[peer].popleft()
        wanted = [self._boundary.hidden]
        if action.kind == Pass.FORWARD and self._boundary.positions is not None:
            wanted.append(self._boundary.positions)
        parts = []
        for part in wanted:
            buffer = torch.empty_like(part, device=self._group.device)
            work = distributed.irecv(
                buffer, self._group.rank_of(peer), group=self._links.get((peer, self._group.stage))
            )
            assert work is not None
            parts.append((work, buffer))
        self._posted[action] = parts

    def _isend(self, part: torch.Tensor, peer: int) -> tuple[distributed.Work, torch.Tensor]:
        work = distributed.isend(part, self._group.rank_of(peer), group=self._links.get((self._group.stage, peer)))
        assert work is not None
        return work, part

    def _release(self, peer: int, used: int) -> None:
        """Let go of the first ``used`` messages to ``peer``, which it has used: their waits return at once."""
        while self._released.get(peer, used) < used:
            for work, _ in self._sent[peer].popleft():
                work.wait()
            self._released[peer] += 1


def _links(group: Group, schedule: Schedule) -> dict[tuple[int, int], distributed.ProcessGroup]:
    """One communicator for each direction between two stages, with NCCL: on one for both ways, a send that waits for
    its receiver would hold up what comes back. gloo needs none.
    """
    if group.device.type != "cuda":
        return {}
    pairs = {
        pair
        for one, other in zip(schedule.stage_of, schedule.stage_of[1:], strict=False)
        if one != other
        for pair in ((one, other), (other, one))
    }
    links: dict[tuple[int, int], distributed.ProcessGroup] = {}
    for pipeline in range(group.pipelines):
        for source, target in sorted(pairs):
            base = pipeline * group.stages
            made = distributed.new_group([base + source, base + target])
            if isinstance(made, distributed.ProcessGroup):  # what ranks outside get is none
                links[source, target] = made
    return links
