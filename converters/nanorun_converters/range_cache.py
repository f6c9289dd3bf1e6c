"""Small reads of a far file, answered from larger blocks that are kept for a while.

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
N_BLOCKS = 16
"""Kept of one file."""

Fetch = Callable[[int, int], "NDArray[np.uint8]"]


class RangeCache:
    """The blocks of one file that were read last; any thread may read."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[int, NDArray[np.uint8]] = OrderedDict()
        self._lock = threading.Lock()
        self._fetching: dict[int, threading.Lock] = {}

    def read(self, offset: int, n_bytes: int, n_file_bytes: int, fetch: Fetch) -> NDArray[np.uint8]:
        """`n_bytes` from `offset`; large runs are fetched as they are, and not kept."""
        first, last = offset // BLOCK_BYTES, (offset + n_bytes - 1) // BLOCK_BYTES
        if n_bytes == 0:
            return np.empty(0, np.uint8)
        if last - first > 1:
            return fetch(offset, n_bytes)
        blocks = [self._block(i, n_file_bytes, fetch) for i in range(first, last + 1)]
        start = offset - first * BLOCK_BYTES
        joined = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        return joined[start : start + n_bytes].copy()

    def _block(self, i_block: int, n_file_bytes: int, fetch: Fetch) -> NDArray[np.uint8]:
        with self._lock:
            own = self._fetching.setdefault(i_block, threading.Lock())
        # Who comes second waits for the first, and finds the block there.
        with own:
            with self._lock:
                block = self._blocks.get(i_block)
                if block is not None:
                    self._blocks.move_to_end(i_block)
                    return block
            start = i_block * BLOCK_BYTES
            block = fetch(start, min(BLOCK_BYTES, n_file_bytes - start))
            with self._lock:
                self._blocks[i_block] = block
                self._fetching.pop(i_block, None)
                while len(self._blocks) > N_BLOCKS:
                    self._blocks.popitem(last=False)
            return block
