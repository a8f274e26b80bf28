"""What a zygote without torch forks: workers that end as they are told."""

import ctypes
import os
import socket
import sys
from pathlib import Path


def work(link: socket.socket) -> int:
    """Obey the command that comes over the link."""
    match link.recv(64).decode():
        case "speak":
            print("to the output")
            print("to the errors", file=sys.stderr)
        case "segfault":
            ctypes.string_at(0)
        case "raise":
            raise ValueError("of my own")
        case "sockets":
            kinds = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
            ties = [kind for kind in kinds if kind.startswith(("socket", "anon_inode"))]
            link.sendall(str(len(ties)).encode())
        case "wait":
            link.sendall(str(os.getpid()).encode())
            link.recv(1)
        case code:
            return int(code)
    return 0
