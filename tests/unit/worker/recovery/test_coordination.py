"""The coordinator's connections, over real sockets."""

import asyncio
import socket

import pytest

from pipelinejob_worker.recovery.coordination import SILENCE_SECONDS, Channel, CoordinatorServer
from pipelinejob_worker.recovery.incarnation import Coordinator
from pipelinejob_worker.recovery.messages import TO_MEMBER


@pytest.mark.parametrize("turns", range(8))
async def test_a_rank_that_comes_while_the_coordinator_stops_is_sent_away_at_once(turns: int) -> None:
    """Whatever the event loop has done for its connection by then: it must ask the next coordinator."""
    server = CoordinatorServer(Coordinator("uid", epoch=1, world_size=2, listen=lambda _: 0))
    port = server.start("127.0.0.1")
    connection = socket.create_connection(("127.0.0.1", port))
    for _ in range(turns):
        await asyncio.sleep(0)
    await server.stop()
    rank = Channel(*await asyncio.open_connection(sock=connection), TO_MEMBER)
    try:
        async with asyncio.timeout(SILENCE_SECONDS / 2):
            assert await rank.receive() is None
    finally:
        await rank.close()
