"""TODO."""

from __future__ import annotations

from hashlib import sha256


def seed(*parts: str | int) -> int:
    """A seed from names and numbers, the same in every process."""
    return int.from_bytes(sha256("/".join(map(str, parts)).encode()).digest()[:8], "little")
