"""Freeing a thread that waits for a peer that will never answer.

A wait of gloo for a frozen peer or a vanished node has no end, and no call of torch's stops it from outside. Shutting
down this process's own end of the connection does: the wait raises an error within milliseconds, also when the peer
is frozen. Any thread of the process may do it.
"""

import os
import socket
import stat
from collections.abc import Collection, Iterator
from contextlib import suppress
from ipaddress import IPv6Address, ip_address
from pathlib import Path


def tcp_sockets() -> frozenset[int]:
    """Return the inodes of this process's TCP sockets: those from before a group is formed are not the group's."""
    inodes = set()
    for inode, duplicate in _tcp_sockets():
        duplicate.close()
        inodes.add(inode)
    return frozenset(inodes)


def shut_down(spare: Collection[int] = (), peers: Collection[str] = ()) -> int:
    """Shut down this process's connected TCP sockets; return how many.

    ``spare``: inodes of sockets to leave alone. ``peers``: addresses; if any are given, only connections with these.
    The descriptors stay open, so whoever uses them gets an error and not another's connection.
    """
    wanted = {_plain(peer) for peer in peers}
    count = 0
    for inode, duplicate in _tcp_sockets():
        with duplicate:
            if inode in spare:
                continue
            with suppress(OSError):  # it listens, is not connected yet, or has just been closed
                peer = duplicate.getpeername()[0]
                if not wanted or _plain(peer) in wanted:
                    duplicate.shutdown(socket.SHUT_RDWR)
                    count += 1
    return count


def _tcp_sockets() -> Iterator[tuple[int, socket.socket]]:
    """Inode and a duplicate of each TCP socket; the caller closes the duplicate."""
    for path in Path("/proc/self/fd").iterdir():
        try:
            duplicate = os.dup(int(path.name))
        except OSError:
            continue  # closed meanwhile, as the descriptor of this listing is
        status = os.fstat(duplicate)
        if not stat.S_ISSOCK(status.st_mode):
            os.close(duplicate)
            continue
        found = socket.socket(fileno=duplicate)
        if found.family in (socket.AF_INET, socket.AF_INET6) and found.type == socket.SOCK_STREAM:
            yield status.st_ino, found
        else:
            found.close()


def _plain(address: str) -> str:
    """One form for an IPv4 address, whether or not it came over an IPv6 socket."""
    parsed = ip_address(address.partition("%")[0])
    mapped = parsed.ipv4_mapped if isinstance(parsed, IPv6Address) else None
    return str(mapped or parsed)
