"""The worker process: ``python -m pipelinejob_worker.train <descriptor of the link to the agent>``."""

import ctypes
import signal
import socket
import sys

from pipelinejob_worker.train.worker import work

_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Train what the agent assigns; return the exit code."""
    # A worker must not outlive its agent, not even one that is blocked in a message to another stage.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        return work(connection)


if __name__ == "__main__":
    sys.exit(main())
