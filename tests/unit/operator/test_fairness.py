"""Many jobs on a small cluster: all run in the end, nobody holds half, and the large ones are not starved.

Time is simulated, the decisions are the real ones. Whenever a job ends or comes, everybody who waits is asked in random
order, as the operator's queue would.
"""

from collections import Counter
from dataclasses import dataclass, field
from random import Random

import pytest

from pipelinejob_operator.controller.placing import Cluster, Outcome, Request, decide, less
from pipelinejob_operator.placement.fit import Node
from pipelinejob_operator.placement.planner import Plan
from tests.unit.operator.test_placing import asks, node


@dataclass
class World:
    """Jobs come by ``arrivals`` (request, duration), one a minute."""

    nodes: tuple[Node, ...]
    arrivals: list[tuple[Request, int]]
    random: Random
    now: int = 0
    waiting: list[Request] = field(default_factory=list)
    running: dict[str, tuple[Request, tuple[str, ...], int]] = field(default_factory=dict)
    started: dict[str, int] = field(default_factory=dict)
    latest: dict[str, int] = field(default_factory=dict)
    """By when the first in the queue must have started: when all have ended that ran as it became the first."""
    reserved: dict[str, Outcome] = field(default_factory=dict)

    def cluster(self) -> Cluster:
        free, held = self.nodes, dict[str, Counter[str]]()
        for request, names, _ in self.running.values():
            free = less(free, request, names)
            for demand, name in zip(request.demands, names, strict=True):
                held.setdefault(name, Counter()).update(dict(demand.requests))
        assert all(sum(c["gpu"] for c in (held.get(n.name, Counter()),)) <= n.free["gpu"] for n in self.nodes)
        return Cluster(free, held)

    def turns(self) -> None:
        """Ask all that wait, until nobody more gets nodes."""
        moved = True
        while moved:
            moved = False
            for request in self.random.sample(self.waiting, len(self.waiting)):
                ahead = sorted((one for one in self.waiting if one.turn < request.turn), key=lambda one: one.turn)
                known = {uid: outcome for uid, outcome in self.reserved.items() if outcome.reserved}
                made = decide(request, ahead, self.fresh(known, ahead), self.cluster())
                self.reserved |= {uid: outcome for uid, outcome in made.ahead.items() if outcome.reserved}
                if isinstance(made.mine.plan, Plan):
                    self.start(request, made.mine.plan.nodes)
                    moved = True
        if self.waiting:
            first = min(self.waiting, key=lambda one: one.turn)
            ends = [end for _, _, end in self.running.values()]
            self.latest.setdefault(first.uid, max(ends, default=self.now))

    def fresh(self, known: dict[str, Outcome], ahead: list[Request]) -> dict[str, Outcome]:
        """Of what is known only the reservations still stand: room has come since."""
        nodes = self.cluster().nodes
        found = {}
        for one in ahead:
            if one.uid in known and not isinstance(decide(one, [], {}, Cluster(nodes)).mine.plan, Plan):
                found[one.uid] = known[one.uid]
        return found

    def start(self, request: Request, names: tuple[str, ...]) -> None:
        self.waiting.remove(request)
        duration = next(length for one, length in self.arrivals if one.uid == request.uid)
        self.running[request.uid] = (request, names, self.now + duration)
        self.started[request.uid] = self.now

    def run(self) -> None:
        coming = list(self.arrivals)
        while coming or self.waiting or self.running:
            ends = [end for _, _, end in self.running.values()]
            assert ends or coming, f"nothing moves any more, and {self.waiting} wait"
            self.now = min([*ends, *([len(self.arrivals) - len(coming)] if coming else [])])
            self.running = {uid: item for uid, item in self.running.items() if item[2] > self.now}
            while coming and len(self.arrivals) - len(coming) <= self.now:
                self.waiting.append(coming.pop(0)[0])
            self.turns()


@pytest.mark.parametrize("seed", range(30))
def test_every_job_runs_and_the_first_that_waits_starts_when_those_before_it_have_ended(seed: int) -> None:
    random = Random(seed)
    nodes = tuple(node(f"n{number}", random.randint(1, 3), random.choice("ab")) for number in range(4))
    whole = sum(item.free["gpu"] for item in nodes)
    sizes = [random.choice([1, 1, 1, 2, whole, random.randint(1, whole)]) for _ in range(15)]
    arrivals = [(asks(f"j{n:02}", size, n), random.randint(1, 10)) for n, size in enumerate(sizes)]
    world = World(nodes, arrivals, random)
    world.run()
    assert set(world.started) == {request.uid for request, _ in arrivals}
    late = {uid: (world.started[uid], due) for uid, due in world.latest.items() if world.started[uid] > due}
    assert not late
