"""Sequences off the device and back: who has to go, what is kept of them, how they return."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from nanorun.errors import EngineError
from nanorun.runtime.prompt_state.archive import Archive
from nanorun.runtime.prompt_state.archived_state import ArchivedState, StatePayload
from nanorun.runtime.prompt_state.branch import Branch
from nanorun.runtime.prompt_state.prefixes import Tokens
from nanorun.runtime.prompt_state.sequences import DeviceSequences


class Eviction:
    """Makes room on the device.

    Args:
        sequences: What is there.
        archive: Where evicted sequences go and come back from.
    """

    def __init__(self, sequences: DeviceSequences, archive: Archive) -> None:
        self._sequences = sequences
        self._archive = archive

    def make_room(self, n_cells: int) -> bool:
        """Evict idle sequences until `n_cells` are free; False if that is not possible."""
        while self._sequences.n_cells_free < n_cells:
            if not self._evict_cheapest():
                return False
        return True

    def begin(self, keep: Branch | None = None) -> Branch | None:
        """A busy sequence without tokens, for which an idle one goes if need be.

        Args:
            keep: An idle sequence that must not be evicted.

        Returns:
            The sequence, or None if all others are busy.
        """
        branch = self._sequences.begin()
        if branch is None and self._evict_cheapest(keep):
            branch = self._sequences.begin()
        return branch

    def _evict_cheapest(self, keep: Branch | None = None) -> bool:
        """Evict the idle sequence whose loss costs least, if there is one."""
        idle = [b for b in self._sequences.branches if not b.busy and b is not keep]
        victim = min(idle, key=self._worth, default=None)
        if victim is not None:
            self._evict(victim)
        return victim is not None

    def _worth(self, branch: Branch) -> float:
        """Few tokens and long unused is worth little."""
        return branch.n_tokens / (1 + self._sequences.clock - branch.last_used)

    def _evict(self, branch: Branch) -> None:
        state = _describe(branch)
        others = (_describe(b) for b in self._sequences.branches if b is not branch)
        is_covered = any(other.makes_useless(state) for other in others)
        if not is_covered and self._archive.wants(state):
            self._archive.put(state, self._sequences.payload(branch))
        self._sequences.drop(branch)

    def save(self, branch: Branch) -> None:
        """Write an idle sequence to the store, where it outlives the process."""
        state = _describe(branch)
        if self._archive.is_to_write(state):
            self._archive.save(state, self._sequences.payload(branch))

    def save_prefix(self, branch: Branch) -> None:
        """Write a sequence that other conversations begin with to the store, before all others."""
        n_tokens = branch.n_tokens
        inner = {p: state for p, state in branch.checkpoints.items() if p < n_tokens}
        state = replace(_describe(branch), checkpoint_positions=frozenset(inner), is_prefix=True)
        if self._archive.is_to_write(state):
            payload = self._sequences.payload(branch)
            self._archive.save(state, StatePayload(payload.full, inner))
        else:
            self._archive.touch_prefix(state.tokens)

    def touch_prefix(self, tokens: Tokens) -> None:
        """Note that a saved prefix was used, wherever it was had from."""
        self._archive.touch_prefix(tokens)

    def recall(self, saved: ArchivedState, n_tokens: int) -> Branch | None:
        """Bring the first `n_tokens` of an archived sequence back, as a busy sequence.

        There must be a sequence to be had, and cells for all that was saved.

        Returns:
            None if the state is gone, damaged or refused by the engine; it is forgotten then.
        """
        # Read before a sequence is made free: what that evicts may push it out of memory.
        payload = self._archive.read(saved)
        if payload is None:
            return None
        branch = self.begin()
        assert branch is not None
        has_room = self.make_room(saved.n_tokens)
        assert has_room
        try:
            self._sequences.restore(branch, saved, payload)
        except EngineError:
            self._archive.forget(saved)
            self._sequences.drop(branch)
            return None
        if n_tokens < saved.n_tokens:
            self._sequences.cut(branch, n_tokens)
        return branch


def _describe(branch: Branch) -> ArchivedState:
    tokens = np.frombuffer(branch.tokens, np.int32).copy()
    return ArchivedState(tokens, checkpoint_positions=frozenset(branch.checkpoints))
