"""Comparing and hashing the beginnings of token sequences."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]
"""Token ids of a sequence or a prompt, shape `(n_tokens,)`."""

_FIRST_CHUNK = 64
_GROWTH = 8
_MIN_MULTIPLIERS = 4096


def n_common(a: Tokens, b: Tokens) -> int:
    """Length of the common prefix of two token arrays.

    Compared in chunks that grow, so that sequences which differ early cost little and sequences
    which agree for long are compared at the speed of memory.
    """
    n = min(len(a), len(b))
    start, size = 0, _FIRST_CHUNK
    while start < n:
        end = min(start + size, n)
        differs = a[start:end] != b[start:end]
        i = int(differs.argmax())
        if differs[i]:
            return start + i
        start, size = end, size * _GROWTH
    return n


def prefix_hashes(tokens: Tokens) -> NDArray[np.uint64]:
    """A hash of every prefix, shape `(n_tokens,)`: element `p - 1` is that of the first `p` tokens.

    Each token is multiplied with a random number of its position; the sums (mod 2^64) of two
    prefixes of one length agree by chance once in 2^47 or more.
    """
    n = len(tokens)
    size = 1 << max(n, _MIN_MULTIPLIERS).bit_length()
    return np.cumsum(tokens.astype(np.uint64) * _multipliers(size)[:n], dtype=np.uint64)


@lru_cache(maxsize=32)
def _multipliers(size: int) -> NDArray[np.uint64]:
    """Random odd numbers; a longer array begins with the shorter ones."""
    numbers = np.random.Generator(np.random.PCG64(0)).integers(0, 2**64, size, np.uint64)
    return numbers | np.uint64(1)
