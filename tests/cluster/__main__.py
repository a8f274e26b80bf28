"""``python3 -m tests.cluster``: the command line."""

import argparse
import os
import sys

from tests.cluster import binaries, lifecycle, progress, selfcheck
from tests.cluster.errors import ClusterError


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = argparse.ArgumentParser(prog="python3 -m tests.cluster", description="A real Kubernetes on this machine.")
    commands = top.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start it, building what is missing; run again to repair or enlarge it")
    up.add_argument("--nodes", type=int, default=4)
    up.add_argument("--gpus-per-node", type=int, default=2)
    up.add_argument("--simulated-nodes", type=int, default=0)
    commands.add_parser("load", help="build the images whose sources changed and load them into all nodes")
    commands.add_parser("status", help="show its programs and nodes")
    commands.add_parser("down", help="take it down and leave nothing but the cache")
    commands.add_parser("selfcheck", help="start, kill and take down a small one, and compare the machine with before")
    commands.add_parser("binaries", help="build its programs and print their directory")
    return top


def main() -> int:
    """Run one command; return the exit status."""
    arguments = parser().parse_args()
    try:
        match arguments.command:
            case "up":
                lifecycle.up(arguments.nodes, arguments.gpus_per_node, arguments.simulated_nodes)
            case "load":
                lifecycle.load()
            case "status":
                lifecycle.status()
            case "down":
                lifecycle.down()
            case "selfcheck":
                selfcheck.run()
            case "binaries":
                progress.say(str(binaries.ensure()))
    except ClusterError as error:
        progress.fail(str(error))
        return 1
    except BrokenPipeError:  # the reader, for instance head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        progress.fail("interrupted; the same command goes on where this one stopped, `make cluster-down` cleans up")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
