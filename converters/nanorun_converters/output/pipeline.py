"""The threads of a conversion: workers that encode pieces, and one that hashes the source."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from nanorun_converters.source.files import Store
from nanorun_converters.tensors.tensor_plan import OutputTensor, Piece

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_Piece = Piece[OutputTensor]

N_PIECES_AHEAD = 3
"""Pieces handed out beyond one a thread, to keep threads busy while the first is written."""
HASH_STEP_BYTES = 4 * 2**20


def n_cores() -> int:
    """Cores this process may use, which can be fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Workers:
    """Threads that work on pieces, a bounded number of them ahead of the writer.

    Args:
        n_threads: How many.
        give_up: Called when the work is to end early: what threads wait for will not come.
    """

    def __init__(self, n_threads: int, give_up: Callable[[], None]) -> None:
        self._pool = ThreadPoolExecutor(n_threads, thread_name_prefix="convert")
        self._n_ahead = n_threads + N_PIECES_AHEAD
        self._give_up = give_up

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._give_up()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def map_in_order(
        self, encode: Callable[[_Piece], NDArray[np.uint8]], pieces: Iterable[_Piece]
    ) -> Iterator[tuple[_Piece, NDArray[np.uint8]]]:
        """Each piece with its bytes, `(n_rows, row_bytes)`, in the order of `pieces`."""
        ahead: deque[tuple[_Piece, Future[NDArray[np.uint8]]]] = deque()
        for piece in pieces:
            ahead.append((piece, self._pool.submit(encode, piece)))
            if len(ahead) >= self._n_ahead:
                first, future = ahead.popleft()
                yield first, future.result()
        while ahead:
            first, future = ahead.popleft()
            yield first, future.result()


class Hashing:
    """Hashes the source's files in a thread of its own, beside the conversion.

    It reads each file front to back, which brings the pages the workers will ask for into memory.
    A file whose hash is known already, from the Hub or from an earlier run, is not read for it.
    """

    def __init__(
        self,
        stores: Sequence[Store],
        known: Mapping[str, str],
        note: Callable[[str, str], None],
    ) -> None:
        self._stores = stores
        self._known = dict(known)
        self._note = note
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hash")
        self._future = self._pool.submit(self._hash_all)

    def __enter__(self) -> Hashing:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown(wait=True)

    def wait(self) -> list[str]:
        """SHA-256 of every file, in hex."""
        return self._future.result()

    def _hash_all(self) -> list[str]:
        return [self._hash(store) for store in self._stores]

    def _hash(self, store: Store) -> str:
        known = store.sha256 or self._known.get(store.name)
        if known:
            return known
        digest = hashlib.sha256()
        for offset in range(0, store.n_bytes, HASH_STEP_BYTES):
            if self._stop.is_set():
                return ""
            step = min(HASH_STEP_BYTES, store.n_bytes - offset)
            digest.update(store.read(offset, step).data)
        self._note(store.name, digest.hexdigest())
        return digest.hexdigest()
