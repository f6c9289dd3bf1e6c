"""A sequence on the device, and where a prompt can start in it."""

from __future__ import annotations

from array import array
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
    busy: bool = True
    last_used: int = 0
    n_cached: int = 0
    """Tokens it began with."""
    cached_from: Place = "device"
    settled: bool = True
    """Whether nothing was rolled back since the last evaluation."""

    @property
    def n_tokens(self) -> int:
        """Tokens evaluated in this sequence."""
        return len(self.tokens)

    def farthest_place(self, prompt: Tokens) -> int:
        """Tokens of `prompt`, its last excepted, after which this sequence has a state; 0 if none.

        That is at its end, or at a checkpoint. Where a rollback is pending there is none.
        """
        if not self.settled:
            return 0
        held = np.frombuffer(self.tokens, np.int32)
        limit = min(n_common(held, prompt), len(prompt) - 1)
        if limit == len(held):
            return limit
        return max((p for p in self.checkpoints if p <= limit), default=0)


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
