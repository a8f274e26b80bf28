"""A forked worker that trains for real, if little: gloo, snapshots, votes, and life after a lost peer.

Each layer is a vector with momentum. What a step computes depends on all layers, over an exact all-reduce, so one lost,
repeated or mixed step changes the bits of every later loss.
"""

import json
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from pipelinejob_worker.pipeline.group import is_link_error
from pipelinejob_worker.recovery.pieces import Incarnation, Piece
from pipelinejob_worker.recovery.pulse import Doing, Heart, LeaveError, Pulse
from pipelinejob_worker.recovery.session import Session
from pipelinejob_worker.recovery.sockets import shut_down, tcp_sockets
from pipelinejob_worker.recovery.tensors import Snapshots, load
from tests.unit.worker.recovery.snapshots import store_in

LAYERS = 6
WIDTH = 1000
LIMIT = timedelta(seconds=60)

Layers = dict[int, dict[str, torch.Tensor]]


def initial(layers: Sequence[int]) -> Layers:
    return {layer: {"weight.w": torch.full((WIDTH,), 1.0 + layer), "exp_avg.w": torch.zeros(WIDTH)} for layer in layers}


def norms_of(state: Layers) -> torch.Tensor:
    """One number a layer, zero for those of other ranks."""
    vector = torch.zeros(LAYERS, dtype=torch.float64)
    for layer, tensors in state.items():
        vector[layer] = torch.linalg.vector_norm(tensors["weight.w"], dtype=torch.float64)
    return vector


def update(state: Layers, step: int, norms: list[float]) -> float:
    """The optimizer; returns the loss."""
    loss = sum(norms)
    for layer, tensors in state.items():
        torch.manual_seed(1000 * step + layer)
        gradient = torch.randn(WIDTH) * (loss % 1.0)
        tensors["exp_avg.w"].mul_(0.9).add_(gradient)
        tensors["weight.w"].sub_(0.01 * tensors["exp_avg.w"])
    return loss


def undisturbed(steps: int) -> list[str]:
    """The losses of one process with all layers."""
    state = initial(range(LAYERS))
    return [update(state, step, norms_of(state).tolist()).hex() for step in range(1, steps + 1)]


class Link:
    """JSON lines to and from the agent; the thread that takes snapshots sends too."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lines = b""
        self._lock = threading.Lock()
        self.guarded = 0
        self.descriptors: list[int] = []

    def send(self, **message: Any) -> None:
        with self._lock:
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, key: str) -> Any:
        """Wait for a message that has this key."""
        while True:
            message = self._take()
            if key in message:
                return message[key]

    def wait_guarded(self, step: int, seconds: float, must_leave: Callable[[], bool]) -> bool:
        """Wait for the guard, but not beyond the end of the incarnation."""
        deadline = time.monotonic() + seconds
        while self.guarded < step and not must_leave():
            left = deadline - time.monotonic()
            if select.select([self._connection], [], [], min(max(left, 0), 0.05))[0]:
                self._take()
            elif left <= 0:
                break
        return self.guarded >= step

    def _take(self) -> dict[str, Any]:
        while b"\n" not in self._lines:
            data, descriptors, _, _ = socket.recv_fds(self._connection, 65536, 1)
            if not data:
                raise EOFError
            self.descriptors += descriptors
            self._lines += data
        line, _, self._lines = self._lines.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        self.guarded = message.get("guarded", self.guarded)
        return message


def work(connection: socket.socket) -> int:
    """Take part in one incarnation after another, until the last step or the end of the agent."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"

    link = Link(connection)
    while True:
        plan = link.receive("plan")
        try:
            _take_part(link, plan)
        except (RuntimeError, LeaveError) as error:
            if not isinstance(error, LeaveError) and not is_link_error(error):
                raise
        else:
            return 0
        finally:
            if distributed.is_initialized():
                distributed.destroy_process_group()
        link.send(left=True)


def _take_part(link: Link, plan: dict[str, Any]) -> None:
    pulse = Pulse.open(Path(plan["pulse"]))
    before = tcp_sockets()
    heart = Heart(pulse, lambda: shut_down(spare=before))
    snapshots: Snapshots | None = None
    try:
        _join(link, plan)
        state = initial(plan["layers"])
        slots = store_in(Path(plan["directory"]))
        link.guarded = 0
        if plan["step"] is not None:
            link.send(joined=True)
            link.receive("fetched")
            for layer in state:
                for name, tensor in load(slots, Piece(layer), plan["step"]).items():
                    state[layer][name].copy_(tensor)
            link.send(valid=plan["step"])
        pieces = {Piece(layer): tensors for layer, tensors in state.items()}
        incarnation = Incarnation(*plan["incarnation"])
        snapshots = Snapshots(slots, incarnation, LAYERS, pieces, lambda step: link.send(valid=step))

        def wait_guarded(step: int, seconds: float) -> bool:
            return link.wait_guarded(step, seconds, lambda: pulse.must_leave)

        session = Session(snapshots, restored=plan["step"], interval=1, wait_guarded=wait_guarded)
        for step in range((plan["step"] or 0) + 1, plan["last_step"] + 1):
            pulse.move(Doing.COMPUTING)
            vector = torch.cat([norms_of(state), torch.tensor(session.ballot(step), dtype=torch.float64)])
            pulse.move(Doing.WAITING)
            distributed.all_reduce(vector)
            pulse.move(Doing.COMPUTING)
            *norms, not_own, not_guarded = vector.tolist()
            loss = update(state, step, norms)
            session.after_update(step, not_own, not_guarded, pieces)
            link.send(step=step, loss=loss.hex())
        snapshots.wait()
        distributed.barrier()
    finally:
        heart.stop()
        if snapshots:
            snapshots.close()


def _join(link: Link, plan: dict[str, Any]) -> None:
    rank, size = plan["rank"], plan["size"]
    listening = {"master_listen_fd": link.descriptors.pop()} if rank == 0 else {}
    store = distributed.TCPStore(
        "127.0.0.1", plan["port"], world_size=size, is_master=rank == 0, timeout=LIMIT, **listening
    )
    prefix = "incarnation-{}-{}".format(*plan["incarnation"])
    distributed.init_process_group(
        "gloo", store=distributed.PrefixStore(prefix, store), rank=rank, world_size=size, timeout=LIMIT
    )
