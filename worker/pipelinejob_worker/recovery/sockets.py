"""Freeing a thread that waits for a peer that will never answer.

A wait of gloo for a frozen peer or a vanished node has no end, and no call of torch's stops it from outside. Shutting
down this process's own end of the connection does: the wait raises an error within milliseconds, also when the peer
is frozen. Any thread of the process may do it.

While a group is formed, one rank of each pair waits for the other one to connect, and has nothing but a listener yet.
It is freed by a caller who says that it is the missing rank and hangs up.
"""

import os
import socket
import stat
import struct
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

KNOCK_SECONDS = 0.1
_NUMBER = struct.Struct("=Q")


def tcp_sockets() -> frozenset[int]:
    """Return the inodes of this process's TCP sockets: those from before a group is formed are not the group's."""
    inodes = set()
    for inode, duplicate in _tcp_sockets():
        duplicate.close()
        inodes.add(inode)
    return frozenset(inodes)


def shut_down(spare: Collection[int] = ()) -> int:
    """Shut down this process's TCP sockets that are connected, or about to be; return how many.

    ``spare``: inodes of sockets to leave alone. The descriptors stay open, so whoever uses them gets an error and not
    another's connection.
    """
    count = 0
    for inode, duplicate in _tcp_sockets():
        with duplicate:
            if inode in spare or _listens(duplicate):
                continue
            with suppress(OSError):  # it has no other end yet, or none any more
                duplicate.shutdown(socket.SHUT_RDWR)
                count += 1
    return count


def knock(numbers: int, spare: Collection[int] = ()) -> None:
    """Connect to each of this process's listeners as one rank after another does that forms a group, and hang up.

    gloo's listener takes what a connection says first for the number of the pair that it belongs to, of which there is
    one for each rank (``gloo/transport/tcp/listener.cc``, ``address.h``). ``numbers``: of ranks. ``spare``: inodes.
    """
    for inode, duplicate in _tcp_sockets():
        with duplicate:
            if inode in spare or not _listens(duplicate):
                continue
            address = duplicate.getsockname()
        for number in range(numbers):
            with suppress(OSError), socket.create_connection(address[:2], KNOCK_SECONDS) as caller:
                caller.sendall(_NUMBER.pack(number))


def _listens(found: socket.socket) -> bool:
    return found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) != 0


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
