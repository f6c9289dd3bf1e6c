"""Sequences that left the device: in host memory within a budget, and on disk."""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nanorun.runtime.prompt_state.archived_state import ArchivedState, StatePayload
from nanorun.runtime.prompt_state.place_index import PlaceIndex
from nanorun.runtime.prompt_state.prefixes import Tokens


class Store(Protocol):
    """Where states outlive the process; see `store.py`."""

    @property
    def index(self) -> PlaceIndex:
        """What it holds."""

    def save(self, state: ArchivedState, payload: StatePayload) -> ArchivedState | None:
        """Write a sequence; None if that failed."""

    def load(self, entry: ArchivedState) -> StatePayload | None:
        """Read a sequence; None if it is damaged."""

    def forget(self, entry: ArchivedState) -> None:
        """Remove a sequence."""

    def touch_prefix(self, tokens: Tokens) -> None:
        """Note that a prefix was used, if it is held."""


class Archive:
    """Sequences that left the device: in host memory as long as there is room, and in the store.

    Args:
        budget_bytes: Host memory it may take, what waits to be written included.
        store: Where all is written that it takes in; None for host memory alone. It is written
            from a thread of its own: running replies wait for the disk only where that is so slow
            that the host memory is spent.
        min_stored_tokens: Shorter sequences are not written; they are read again as soon.
    """

    def __init__(
        self, budget_bytes: int, store: Store | None = None, min_stored_tokens: int = 0
    ) -> None:
        self.planned_bytes = budget_bytes
        """Host memory it may take when there is plenty."""
        self._budget = budget_bytes
        self._store = store
        self._min_stored_tokens = min_stored_tokens
        self._kept: OrderedDict[ArchivedState, StatePayload] = OrderedDict()
        """The least recently used first."""
        self._in_writing: dict[ArchivedState, StatePayload] = {}
        """Not yet in the store; the writer's thread takes out what is."""
        self._index = PlaceIndex()
        """What is in one of the two."""
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="state-writer")

    @property
    def entries(self) -> tuple[ArchivedState, ...]:
        """All it holds, the quickest to be had first."""
        stored = self._store.index.entries if self._store is not None else ()
        return (*self._index.entries, *stored)

    @property
    def version(self) -> tuple[int, ...]:
        """Another one whenever something else may be found."""
        stored = (self._store.index.version,) if self._store is not None else ()
        return (self._index.version, *stored)

    def longest(
        self, tokens: Tokens, hashes: NDArray[np.uint64], n_most: int
    ) -> tuple[ArchivedState, int] | None:
        """Where a prompt can start with the least to evaluate; see `PlaceIndex.longest`.

        What is in host memory goes before as much on disk.
        """
        found = self._index.longest(tokens, hashes, n_most)
        if self._store is None:
            return found
        stored = self._store.index.longest(tokens, hashes, n_most)
        if found is None or (stored is not None and stored[1] > found[1]):
            return stored
        return found

    @property
    def host_bytes(self) -> int:
        """Host memory in use."""
        return sum(payload.n_bytes for payload in self._in_memory().values())

    @property
    def is_writing(self) -> bool:
        """Whether something is not yet in the store."""
        return bool(self._in_writing)

    def _in_memory(self) -> dict[ArchivedState, StatePayload]:
        return {**self._in_writing.copy(), **self._kept}

    def limit(self, n_bytes: int) -> None:
        """Take no more host memory than that; the least recently used go at once.

        What is on its way to the disk goes once it is there.
        """
        self._budget = max(0, min(n_bytes, self.planned_bytes))
        while sum(payload.n_bytes for payload in self._kept.values()) > self._budget:
            self._drop(next(iter(self._kept)))

    def put(self, state: ArchivedState, payload: StatePayload) -> None:
        """Take a sequence in; those that it makes useless go."""
        for old in self._index.covered_by(state):
            self._drop(old)
        if payload.n_bytes <= self._budget:
            self._make_room(payload.n_bytes)
            self._kept[state] = payload
            self._index.add(state)
        self.save(state, payload)

    def save(self, state: ArchivedState, payload: StatePayload) -> None:
        """Write a sequence to the store, if that is to have it and lacks it."""
        if self._store is None or not self.is_to_write(state):
            return
        if state not in self._kept:
            self._make_room(payload.n_bytes)
        self._in_writing[state] = payload
        self._index.add(state)
        self._writer.submit(self._write, self._store, state, payload)

    def is_to_write(self, state: ArchivedState) -> bool:
        """Whether the store is to have a sequence, and neither has it nor soon will."""
        if self._store is None or state.n_tokens < self._min_stored_tokens:
            return False
        if any(entry.makes_useless(state) for entry in self._in_writing.copy()):
            return False
        return not self._store.index.covers(state)

    def _write(self, store: Store, state: ArchivedState, payload: StatePayload) -> None:
        try:
            store.save(state, payload)
        finally:
            del self._in_writing[state]
            if state not in self._kept:
                self._index.discard(state)

    def _make_room(self, n_bytes: int) -> None:
        """Wait for the disk, then drop the least recently used, until there is room."""
        if self.host_bytes + n_bytes > self._budget and self.is_writing:
            self.wait()
        while self._kept and self.host_bytes + n_bytes > self._budget:
            self._drop(next(iter(self._kept)))

    def _drop(self, state: ArchivedState) -> None:
        """Give a sequence's host memory back, at the latest once it is written."""
        self._kept.pop(state, None)
        if state not in self._in_writing:
            self._index.discard(state)

    def read(self, state: ArchivedState) -> StatePayload | None:
        """The payload of an entry, the most recently used now; None if it is no longer held."""
        if state.place == "disk":
            return self._store.load(state) if self._store is not None else None
        payload = self._kept.get(state)
        if payload is None:
            return self._in_writing.get(state)
        self._kept.move_to_end(state)
        return payload

    def forget(self, state: ArchivedState) -> None:
        """Drop an entry."""
        self._kept.pop(state, None)
        self._index.discard(state)
        if state.place == "disk" and self._store is not None:
            self._store.forget(state)

    def touch_prefix(self, tokens: Tokens) -> None:
        """Note that a prefix was used, wherever it was had from."""
        if self._store is not None:
            self._store.touch_prefix(tokens)

    def wants(self, state: ArchivedState) -> bool:
        """Whether it would be worth a place: nothing held makes it useless."""
        if self._budget <= 0 and self._store is None:
            return False
        stored = self._store is not None and self._store.index.covers(state)
        return not stored and not self._index.covers(state)

    def wait(self) -> None:
        """Wait until all that is to be written is."""
        self._writer.submit(lambda: None).result()

    def close(self) -> None:
        """Write what is not in the store yet, and wait for that."""
        for state, payload in tuple(self._kept.items()):
            self.save(state, payload)
        self._writer.shutdown(wait=True)
