"""Finding among thousands of archived sequences those that a prompt can start from."""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from nanorun.runtime.prompt_state.archived_state import ArchivedState
from nanorun.runtime.prompt_state.prefixes import Tokens, n_common, prefix_hashes


class PlaceIndex:
    """Archived sequences by the hashes of their places: their ends and their checkpoints.

    One look-up compares one hash for each place, all at once; tokens are compared only where
    hashes agree. Several threads may use it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers: dict[ArchivedState, int] = {}
        self._entries: dict[int, ArchivedState] = {}
        self._next = 0
        self.version = 0
        """Goes up with each change."""
        # One row a place, shape (n_places,) each.
        self._positions = np.empty(0, np.int64)
        self._hashes = np.empty(0, np.uint64)
        self._owners = np.empty(0, np.int64)

    @property
    def entries(self) -> tuple[ArchivedState, ...]:
        """The sequences, in the order in which they came."""
        with self._lock:
            return tuple(self._numbers)

    def add(self, entry: ArchivedState) -> None:
        """List a sequence; does nothing if it is listed."""
        places = (p for p in entry.places if 0 < p <= entry.n_tokens)
        positions = np.fromiter(places, np.int64)
        hashes = prefix_hashes(entry.tokens)[positions - 1]
        with self._lock:
            if entry in self._numbers:
                return
            self.version += 1
            number, self._next = self._next, self._next + 1
            self._numbers[entry], self._entries[number] = number, entry
            self._positions = np.concatenate((self._positions, positions))
            self._hashes = np.concatenate((self._hashes, hashes))
            self._owners = np.concatenate((self._owners, np.full(len(positions), number)))

    def discard(self, entry: ArchivedState) -> None:
        """Take a sequence from the list, if it is there."""
        with self._lock:
            number = self._numbers.pop(entry, None)
            if number is None:
                return
            self.version += 1
            del self._entries[number]
            stays = self._owners != number
            self._positions = self._positions[stays]
            self._hashes = self._hashes[stays]
            self._owners = self._owners[stays]

    def longest(
        self, tokens: Tokens, hashes: NDArray[np.uint64], n_most: int
    ) -> tuple[ArchivedState, int] | None:
        """The sequence with the farthest place on the path of `tokens`, and that place.

        Of several the shortest, because all of a sequence is restored before it is cut.

        Args:
            tokens: A prompt.
            hashes: Its `prefix_hashes`.
            n_most: The farthest place that is of use.
        """
        numbers, positions = self._on_path(hashes[:n_most])
        while len(positions):
            farthest = int(positions.max())
            entries = self._listed(numbers[positions == farthest])
            for entry in sorted(entries, key=lambda entry: entry.n_tokens):
                if n_common(entry.tokens[:farthest], tokens) == farthest:
                    return entry, farthest
            nearer = positions < farthest
            numbers, positions = numbers[nearer], positions[nearer]
        return None

    def covers(self, state: ArchivedState) -> bool:
        """Whether a listed sequence makes `state` useless."""
        numbers, positions = self._on_path(prefix_hashes(state.tokens))
        owners = self._listed(numbers[positions == state.n_tokens])
        return any(owner.makes_useless(state) for owner in owners)

    def covered_by(self, state: ArchivedState) -> list[ArchivedState]:
        """Listed sequences that `state` makes useless."""
        numbers, _ = self._on_path(prefix_hashes(state.tokens))
        entries = self._listed(np.unique(numbers))
        return [entry for entry in entries if entry is not state and state.makes_useless(entry)]

    def _on_path(self, hashes: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Places whose hash is that of the path's prefix of their length.

        Returns:
            The numbers of their sequences and their positions, shape `(n_found,)` each.
        """
        with self._lock:
            rows = np.flatnonzero(self._positions <= len(hashes))
            rows = rows[hashes[self._positions[rows] - 1] == self._hashes[rows]]
            return self._owners[rows], self._positions[rows]

    def _listed(self, numbers: NDArray[np.int64]) -> list[ArchivedState]:
        """Sequences by their numbers; those that another thread took from the list are left out."""
        found = (self._entries.get(number) for number in numbers.tolist())
        return [entry for entry in found if entry is not None]
