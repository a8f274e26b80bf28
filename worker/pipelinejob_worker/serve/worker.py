"""One stage in one epoch of the group: meet the others, serve until stopped or until one is lost."""

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from pipelinejob_worker.serve.engine import Follower, Layers, Leader
from pipelinejob_worker.serve.hop import Bounds
from pipelinejob_worker.serve.ring import Member, form
from pipelinejob_worker.serve.scheduler import Limits
from pipelinejob_worker.serve.text import Decode
from pipelinejob_worker.serve.wire import Ready

FORM_SECONDS = 60.0
"""How long a stage waits for the others; one that loads a large model comes only when it has it."""


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
    member: Member,
    listener: socket.socket,
    *,
    front: tuple[str, int] = ("", 0),
    decode: Decode | None = None,
    started: Callable[[Leader | None, int], None] = lambda *_: None,
) -> None:
    """Serve as stage ``member.stage`` until stage 0 is told to stop. The layers are as good as new for another epoch.

    ``blocks``: of this stage's cache. ``listener``: where the stage before connects. ``front``: host and port at which
    stage 0 listens to fronts. ``started`` is told of stage 0 the leader and the port of the fronts.

    Raises HopError when the stages do not meet, when one is lost, and on other stages than 0 also after ``stop``.
    """
    bounds = Bounds(member.stages, service.batch_tokens, service.width, blocks)
    ring = form(member, listener, bounds, repr(service), time.monotonic() + FORM_SECONDS)
    try:
        if member.stage:
            started(None, 0)
            Follower(layers, ring, member.epoch, last=member.last).run()
            return
        limits = Limits(
            blocks=ring.blocks,
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
        leader = Leader(layers, ring, ready, limits, decode)
        leader.run(*front, lambda port: started(leader, port))
    finally:
        ring.close()
