"""A worker that takes snapshots until it is killed."""

import socket
from itertools import count
from pathlib import Path

from tests.unit.worker.recovery.snapshots import held, store_in, write


def work(link: socket.socket) -> int:
    """Take snapshots of four layers, step after step from 1 on, in the directory that the link names."""
    store = store_in(Path(link.recv(4096).decode()))
    sizes = dict.fromkeys(range(4), 200000)
    store.reserve({held(layer, 1).piece: size for layer, size in sizes.items()}, copied=False)
    first = 1 + max((each.step for each in store.held()), default=0)
    for step in count(first):
        for layer, size in sizes.items():
            write(store, held(layer, step, size=size))
        if step == first + 2:
            link.sendall(b"3 steps")
    return 0
