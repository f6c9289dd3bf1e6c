"""A sequence on the device, and where a prompt can start in it."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nanorun.runtime.prompt_state.archived_state import ArchivedState
from nanorun.runtime.prompt_state.prefixes import Tokens, n_common
from nanorun.runtime.prompt_state.spans import Node

Place = Literal["device", "host", "disk"]


@dataclass(eq=False, slots=True)
class Branch:
    """A device sequence: its tokens so far, and the states saved along them."""

    seq_id: int
    node: Node
    """Where it ends in the tree of spans."""
    tokens: array[int] = field(default_factory=lambda: array("i"))
    checkpoints: dict[int, bytes] = field(default_factory=dict)
    """Position to recurrent state."""
    n_prefix: int = 0
    """Tokens that other conversations begin with as well; the checkpoint there goes last."""
    busy: bool = True
    last_used: int = 0
    n_cuts: int = 0
    """How often it was shortened; between two cuts it only grows."""
    n_cached: int = 0
    """Tokens it began with."""
    cached_from: Place = "device"
    settled: bool = True
    """Whether nothing was rolled back since the last evaluation."""

    @property
    def n_tokens(self) -> int:
        """Tokens evaluated in this sequence."""
        return len(self.tokens)

    def compare(self, prompt: Tokens, known: Shared | None = None) -> Shared:
        """The beginning that this sequence shares with a prompt.

        Args:
            prompt: The prompt.
            known: What was found for the same prompt before: only what is new is compared.
        """
        n_same = 0
        if known is not None and known.n_cuts == self.n_cuts:
            if known.n_common < known.n_held:  # they part there, whatever comes after it
                return known
            n_same = known.n_common
        held = np.frombuffer(self.tokens, np.int32)
        n_more = n_common(held[n_same:], prompt[n_same:]) if len(held) > n_same else 0
        return Shared(self.n_cuts, len(held), n_same + n_more)

    def farthest_place(self, n_most: int) -> int:
        """The most of its first `n_most` tokens after which it has a state; 0 if none.

        That is at its end, or at a checkpoint. Where a rollback is pending there is none.
        """
        if not self.settled:
            return 0
        if n_most == self.n_tokens:
            return n_most
        return max((p for p in self.checkpoints if p <= n_most), default=0)


@dataclass(frozen=True, slots=True)
class Shared:
    """What a sequence was found to share with a prompt."""

    n_cuts: int
    n_held: int
    """Tokens and cuts of the sequence when they were compared."""
    n_common: int


@dataclass(frozen=True, slots=True)
class ArchivedPlace:
    """Where in an archived sequence a prompt can start."""

    version: tuple[int, ...]
    """That of the archive when this was found."""
    entry: ArchivedState | None = None
    n_tokens: int = 0
    n_common: int = 0
    """Tokens that the sequence shares with the prompt."""


@dataclass(frozen=True, slots=True)
class Match:
    """The place where a prompt can start with the least to evaluate."""

    prompt: Tokens
    hashes: NDArray[np.uint64]
    """The prompt's `prefix_hashes`, shape `(n_tokens,)`."""
    version: int
    """That of the tree when this was found."""
    n_tokens: int
    """Tokens of the prompt that need not be evaluated."""
    holder: Branch | ArchivedState | None
    """The sequence that begins with them."""
    shared: Mapping[Branch, Shared]
    """What each sequence of the device has in common with the prompt."""
    archived: ArchivedPlace
    """What was found in the archive."""

    @property
    def n_common(self) -> int:
        """Tokens of the prompt, its last excepted, that were read before: with or without a state
        to start from.
        """
        n_most = max((s.n_common for s in self.shared.values()), default=0)
        return min(max(n_most, self.archived.n_common), len(self.prompt) - 1)
