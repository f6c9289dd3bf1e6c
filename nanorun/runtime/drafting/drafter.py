"""Speculative decoding: guess some tokens, let the model check them all in one batch.

A `Drafter` only guesses. The engine keeps a guess only where the model, sampled as ever, says the
same token; so replies are those of plain decoding, and a sampled reply keeps its distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """A sequence that wants guesses."""

    seq_id: int
    tokens: Sequence[int]
    """What was evaluated."""
    pending: int
    """The token after that, picked and not evaluated."""
    n_most: int
    """Guesses that there is use for."""


class Drafter(Protocol):
    """Guesses tokens."""

    def draft(self, requests: Sequence[DraftRequest]) -> list[list[int]]:
        """Tokens that may follow each sequence's pending one; empty where there is no idea."""


class NoDrafts:
    """Guesses nothing."""

    def draft(self, requests: Sequence[DraftRequest]) -> list[list[int]]:
        """No ideas."""
        return [[] for _ in requests]


def next_draft_length(n_drafted: int, n_accepted: int, n_most: int) -> int:
    """How many tokens to guess next: one more after a full hit, no more than hit after a miss."""
    return max(1, min(n_most, n_accepted + (n_accepted == n_drafted)))
