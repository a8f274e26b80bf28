"""A forked worker that runs what a test says, with its link to the agent as ``link``."""

import os
import socket


def work(link: socket.socket) -> int:
    exec(os.environ["WORKER_SCRIPT"], {"link": link})
    return 0
