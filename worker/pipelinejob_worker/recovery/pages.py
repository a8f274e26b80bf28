"""Pages of memory before they are written."""

import ctypes
import errno
import mmap
import os

POPULATED_BYTES = 4 << 20
"""A few milliseconds of work: 1.2 where memory is at hand, 12 where the hypervisor has to find it."""

MADV_POPULATE_WRITE = 23
"""madvise(2); the mmap module knows it from Python 3.14 on."""
_LIBC = ctypes.CDLL(None, use_errno=True)


def populate(memory: mmap.mmap) -> None:
    """Have all pages: where the hypervisor has taken unused memory back, a first touch takes 3 s a GB.

    Others have their turn meanwhile: mmap's own ``madvise`` would hold the interpreter's lock, and the kernel lets
    nobody map memory during a call.
    """
    mapped = ctypes.c_char.from_buffer(memory)
    for start in range(0, len(memory), POPULATED_BYTES):
        length = min(POPULATED_BYTES, len(memory) - start)
        if _LIBC.madvise(
            ctypes.c_void_p(ctypes.addressof(mapped) + start), ctypes.c_size_t(length), MADV_POPULATE_WRITE
        ):
            error = ctypes.get_errno()
            if error != errno.EINVAL:
                raise OSError(error, os.strerror(error))
            return  # Linux before 5.14: pages come as they are written
