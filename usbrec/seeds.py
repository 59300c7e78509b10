"""Random numbers by name: every draw comes from a seed that its own place in the run decides.

A row's seed is a hash of words such as ("pairs", dialogue, turn, sample), so that a draw never
depends on neighbours, on order, or on a restart.
"""

import hashlib


def seed_for(*parts: str | int) -> int:
    """Return a 63-bit seed for the named place, the same on every machine and in every process."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
