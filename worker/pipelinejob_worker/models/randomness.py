"""Seeds that depend on what is computed, never on where: the base of bit-equal losses for every split."""

import hashlib
import struct


def mix(*values: int) -> int:
    """Mix non-negative integers below 2**64 into one seed of 63 bits; order and number of values matter."""
    packed = struct.pack(f"<{len(values)}Q", *values)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1
