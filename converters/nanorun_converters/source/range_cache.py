"""Small reads of far files, answered from larger blocks that are kept for a while.

Headers, scales and norms lie close together; each would cost a round trip of its own.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK_BYTES = 2**20
N_BLOCKS = 64
"""Kept, of all files together."""

Fetch = Callable[[int, int], "NDArray[np.uint8]"]


class RangeCache:
    """The blocks that were read last; any thread may read."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[tuple[str, int], NDArray[np.uint8]] = OrderedDict()
        self._lock = threading.Lock()
        self._fetching: dict[tuple[str, int], threading.Lock] = {}

    def read(
        self, file: str, offset: int, n_bytes: int, n_file_bytes: int, fetch: Fetch
    ) -> NDArray[np.uint8]:
        """`(n_bytes,)` of `file` from `offset`; large runs are fetched as they are, not kept."""
        first, last = offset // BLOCK_BYTES, (offset + n_bytes - 1) // BLOCK_BYTES
        if n_bytes == 0:
            return np.empty(0, np.uint8)
        if last - first > 1:
            return fetch(offset, n_bytes)
        blocks = [self._block(file, i, n_file_bytes, fetch) for i in range(first, last + 1)]
        start = offset - first * BLOCK_BYTES
        joined = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        return joined[start : start + n_bytes].copy()

    def _block(self, file: str, i_block: int, n_file_bytes: int, fetch: Fetch) -> NDArray[np.uint8]:
        key = (file, i_block)
        with self._lock:
            own = self._fetching.setdefault(key, threading.Lock())
        # Who comes second waits for the first, and finds the block there.
        with own:
            with self._lock:
                block = self._blocks.get(key)
                if block is not None:
                    self._blocks.move_to_end(key)
                    return block
            start = i_block * BLOCK_BYTES
            block = fetch(start, min(BLOCK_BYTES, n_file_bytes - start))
            with self._lock:
                self._blocks[key] = block
                self._fetching.pop(key, None)
                while len(self._blocks) > N_BLOCKS:
                    self._blocks.popitem(last=False)
            return block
