"""A bound on what is made of a file, in proportion to its size."""

from __future__ import annotations

from weightops.errors import CheckpointError

EXPANSION = 16
"""The most work for each byte of a file. Sound files need one unit for some bytes."""

OBJECT = 88
"""The work for an object with items of its own, about its bytes in memory."""


class Budget:
    """The work that is left for one file: bytes of memory, characters of names, items looked at.

    Args:
        size: the bytes of the file.
    """

    def __init__(self, size: int) -> None:
        self._left = EXPANSION * size + 4_000_000

    def spend(self, amount: int) -> None:
        """Count some work.

        Raises:
            CheckpointError: if it is more than a file of this size may ask for.
        """
        self._left -= amount
        if self._left < 0:
            raise CheckpointError(f"it asks for more than {EXPANSION} times its size")
