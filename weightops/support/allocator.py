"""The allocator of memory, which is told to keep what a pass through a model frees for the next."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of the GNU C library
_KEPT = 2**31 - 1
"""The freed bytes at the heap's end from which they go back to the system: the most it takes."""

_MAPPED = 2**30
"""The bytes from which an allocation is a mapping of its own, which goes back when it is freed."""


@cache
def keep_freed_memory() -> bool:
    """Let freed memory stay with the process, up to 2 GiB, and return whether it does.

    The GNU C library gives it back to the system soon, and the next pass through a model takes the
    pages of its activations anew, which is up to a quarter of its time. What is kept is used again,
    so that the peak stays the same. Other C libraries stay as they are.

    >>> keep_freed_memory() in (True, False)
    True
    """
    with suppress(AttributeError, OSError, TypeError):  # other systems have no such function
        library = ctypes.CDLL(None)
        trimmed = library.mallopt(_M_TRIM_THRESHOLD, _KEPT)
        return bool(trimmed and library.mallopt(_M_MMAP_THRESHOLD, _MAPPED))
    return False
