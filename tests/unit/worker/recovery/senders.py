"""An agent that sends copies slowly, so that it can be killed meanwhile."""

import asyncio
import json
import socket
from pathlib import Path

from pipelinejob_worker.recovery.copies import PieceClient
from pipelinejob_worker.recovery.transport import Address
from tests.unit.worker.recovery.snapshots import FIRST, store_in


def work(link: socket.socket) -> int:
    """Send all pieces of a directory to a port, at a rate."""
    directory, port, rate = json.loads(link.recv(4096))
    store = store_in(Path(directory))
    client = PieceClient(store, "uid-1", 0)
    asyncio.run(client.guard(Address("127.0.0.1", port), FIRST, store.held(), bytes_per_second=rate))
    return 0
