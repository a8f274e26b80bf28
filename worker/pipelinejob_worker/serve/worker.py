"""One stage in one epoch of the group that has met: serve until stopped or until a stage is lost."""

from collections.abc import Callable
from dataclasses import dataclass

from pipelinejob_worker.serve.engine import Follower, Layers, Leader
from pipelinejob_worker.serve.hop import Bounds
from pipelinejob_worker.serve.ring import Circle, Departure
from pipelinejob_worker.serve.scheduler import Limits
from pipelinejob_worker.serve.text import Decode
from pipelinejob_worker.serve.wire import Ready, Stats

LOAD_SECONDS = 1800.0
"""How long a stage waits for others that load their layers; one that dies meanwhile is noticed at once."""


@dataclass(frozen=True)
class Service:
    """What all stages of a job have in common."""

    model: str
    """Its fingerprint."""

    vocabulary: int
    context: int
    width: int
    """Size of a hidden state."""

    batch_tokens: int
    accepted_tokens: int
    deterministic: bool
    batches: int = 0
    """Most batches in flight; 0 is as many as there are stages. One more hides the time of a hop, but all are smaller,
    and a stage reads its weights once for each: only where a hop takes long does it pay."""


def serve(
    service: Service,
    layers: Layers,
    blocks: int,
    circle: Circle,
    *,
    front: tuple[str, int] = ("", 0),
    decode: Decode | None = None,
    started: Callable[[Leader | None, int], None] = lambda *_: None,
    report: Callable[[Stats], None] = lambda _: None,
    departure: Departure | None = None,
) -> None:
    """Serve as a stage of ``circle`` until stage 0 is told to stop. The layers are as good as new for another epoch.

    ``blocks``: of this stage's cache. ``front``: host and port at which stage 0 listens to fronts. ``started`` is told
    of stage 0 the leader and the port of the fronts; ``report``, on stage 0, the statistics.

    Raises HopError when a stage is lost, or at the order of ``departure``.
    """
    member, departure = circle.member, departure or Departure()
    departure.waits()
    agreed = min(note["blocks"] for note in circle.exchange({"blocks": blocks}, LOAD_SECONDS))
    ring = circle.ring(Bounds(member.stages, service.batch_tokens, service.width, agreed))
    if member.stage:
        started(None, 0)
        Follower(layers, ring, member.epoch, last=member.last, departure=departure).run()
        return
    limits = Limits(
        blocks=agreed,
        context=service.context,
        batches=service.batches or member.stages,
        batch_tokens=service.batch_tokens,
        accepted_tokens=service.accepted_tokens,
    )
    ready = Ready(
        epoch=member.epoch,
        vocabulary=service.vocabulary,
        context=limits.request_tokens,
        deterministic=service.deterministic,
    )
    leader = Leader(layers, ring, ready, limits, decode, report=report, departure=departure)
    leader.run(*front, lambda port: started(leader, port))
