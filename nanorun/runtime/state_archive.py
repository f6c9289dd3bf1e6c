"""Sequences that left the device: in host memory within a budget, then on disk."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(eq=False, slots=True)
class ArchivedState:
    """What is known of an archived sequence without reading its state."""

    tokens: NDArray[np.int32]
    place: Literal["host", "disk"] = "host"
    checkpoint_positions: frozenset[int] = frozenset()
    path: Path | None = None
    """Its file, where it is on disk."""

    @property
    def n_tokens(self) -> int:
        """Tokens of the sequence."""
        return len(self.tokens)

    def makes_useless(self, other: ArchivedState) -> bool:
        """Whether every prompt that could start from `other` can start from here as well."""
        n = other.n_tokens
        places = self.checkpoint_positions | {self.n_tokens}
        return (
            self.n_tokens >= n
            and (other.checkpoint_positions | {n}) <= places
            and np.array_equal(self.tokens[:n], other.tokens)
        )


@dataclass(frozen=True, slots=True)
class StatePayload:
    """A sequence's state: KV and recurrent part of its end, and the states saved along it."""

    full: bytes
    checkpoints: Mapping[int, bytes] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        """Memory it takes."""
        return len(self.full) + sum(len(state) for state in self.checkpoints.values())


class Store(Protocol):
    """Where states outlive the process; see `state_store.py`."""

    @property
    def entries(self) -> tuple[ArchivedState, ...]:
        """What it holds."""

    def save(self, state: ArchivedState, payload: StatePayload) -> ArchivedState | None:
        """Write a sequence; None if that failed."""

    def load(self, entry: ArchivedState) -> StatePayload | None:
        """Read a sequence; None if it is damaged."""

    def forget(self, entry: ArchivedState) -> None:
        """Remove a sequence."""


class Archive:
    """Evicted sequences: host memory first, a store behind it.

    Args:
        budget_bytes: Host memory it may take; the least recently used entries move on to the store.
        store: Where they move; None to drop them. It is written from a thread of its own, so that
            running replies do not wait for the disk.
    """

    def __init__(self, budget_bytes: int, store: Store | None = None) -> None:
        self._budget = budget_bytes
        self._payloads: dict[ArchivedState, StatePayload] = {}
        self._store = store
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="state-writer")

    @property
    def entries(self) -> tuple[ArchivedState, ...]:
        """All it holds; in host memory the least recently used first."""
        stored = self._store.entries if self._store is not None else ()
        return (*self._payloads, *stored)

    @property
    def host_bytes(self) -> int:
        """Host memory in use."""
        return sum(payload.n_bytes for payload in self._payloads.values())

    def put(self, state: ArchivedState, payload: StatePayload) -> None:
        """Take a sequence in; one too large for host memory goes straight to the store."""
        state.checkpoint_positions = frozenset(payload.checkpoints)
        if payload.n_bytes > self._budget:
            self.save(state, payload)
            return
        while self._payloads and self.host_bytes + payload.n_bytes > self._budget:
            oldest = next(iter(self._payloads))
            self.save(oldest, self._payloads.pop(oldest))
        self._payloads[state] = payload

    def save(self, state: ArchivedState, payload: StatePayload) -> None:
        """Write a sequence to the store, unless that has as much already."""
        state.checkpoint_positions = frozenset(payload.checkpoints)
        if self._store is None or any(e.makes_useless(state) for e in self._store.entries):
            return
        self._writer.submit(self._store.save, state, payload)

    def read(self, state: ArchivedState) -> StatePayload | None:
        """The payload of an entry, which thereby becomes the most recently used."""
        if state.place == "disk":
            return self._store.load(state) if self._store is not None else None
        payload = self._payloads.pop(state, None)
        if payload is not None:
            self._payloads[state] = payload
        return payload

    def forget(self, state: ArchivedState) -> None:
        """Drop an entry."""
        self._payloads.pop(state, None)
        if state.place == "disk" and self._store is not None:
            self._store.forget(state)

    def wants(self, state: ArchivedState) -> bool:
        """Whether it would be worth a place: nothing held makes it useless."""
        has_room = self._budget > 0 or self._store is not None
        return has_room and not any(entry.makes_useless(state) for entry in self.entries)

    def close(self) -> None:
        """Move everything to the store and wait until it is written."""
        for state, payload in self._payloads.items():
            self.save(state, payload)
        self._writer.shutdown(wait=True)
