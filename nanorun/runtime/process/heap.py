"""Freed memory, given back to the system."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress


def return_to_system() -> None:
    """Give freed memory back, where the C library keeps it for later.

    glibc maps large blocks one by one only at first: once such a block is freed, blocks of up to
    its size (32 MiB at most) come from the heap, which shrinks at its end alone (`mallopt(3)`,
    M_MMAP_THRESHOLD).
    """
    if sys.platform == "linux":
        with suppress(AttributeError):  # musl gives it back by itself
            ctypes.CDLL(None).malloc_trim(0)
