"""What one sequence adds to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens that one sequence adds to a batch, at positions `pos`, `pos + 1`, ..."""

    seq_id: int
    pos: int
    tokens: Sequence[int]
    wants_logits: bool
    """Whether the logits after the last of them are wanted."""
    all_logits: bool = False
    """Whether the logits after each of them are wanted (scoring)."""
    n_drafts: int = 0
    """Tokens at the end that are only guessed; the logits after each of them are wanted too."""

    @property
    def n_certain(self) -> int:
        """Tokens that are no guesses."""
        return len(self.tokens) - self.n_drafts
