"""Speculative decoding: guess some tokens, let the model check them all in one batch.

A `Drafter` stands between the engine and the context: it evaluates batches, guesses what comes
next, and looks after whatever of a sequence its guesses need. The engine keeps a guess only where
the model, sampled as ever, says the same token; so replies are those of plain decoding, and a
sampled reply keeps its distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nanorun.runtime.llama.context import Context, Row
from nanorun.runtime.prompt_state.memory import SequenceMemory

# Tokens whose last occurrence is looked for, the longest first.
_NGRAMS = (4, 3)


@dataclass(frozen=True, slots=True)
class Guess:
    """A sequence that wants drafts."""

    seq_id: int
    tokens: Sequence[int]
    """What was evaluated."""
    pending: int
    """The token after that, picked and not evaluated."""
    n_most: int


class Drafter(Protocol):
    """Evaluates batches and guesses tokens."""

    memory: SequenceMemory
    """The sequences, with all that drafting keeps of them."""

    def decode(self, rows: Sequence[Row]) -> list[int | None]:
        """Evaluate a batch; see `Context.decode`."""

    def follow(self, kept: Sequence[tuple[Row, int]]) -> None:
        """Take note of how many tokens of each row of the last batch stay."""

    def draft(self, guesses: Sequence[Guess]) -> list[list[int]]:
        """Tokens that may follow each sequence's pending one; empty where there is no idea."""

    def close(self) -> None:
        """Free what it holds."""


class PlainDecoding:
    """No guesses."""

    def __init__(self, context: Context) -> None:
        self.memory: SequenceMemory = context
        self._context = context

    def decode(self, rows: Sequence[Row]) -> list[int | None]:
        """Evaluate a batch."""
        return self._context.decode(rows)

    def follow(self, kept: Sequence[tuple[Row, int]]) -> None:
        """Nothing to follow."""

    def draft(self, guesses: Sequence[Guess]) -> list[list[int]]:
        """No ideas."""
        return [[] for _ in guesses]

    def close(self) -> None:
        """Nothing to free."""


class LookupDrafter(PlainDecoding):
    """Guesses that what followed the last few tokens before will follow them again.

    It costs nothing and pays where a reply repeats its prompt: code, quotations, tool results
    ("prompt lookup decoding", A. Saxena 2023).
    """

    def draft(self, guesses: Sequence[Guess]) -> list[list[int]]:
        """What followed the last occurrence of each sequence's end."""
        return [look_up(np.append(g.tokens, g.pending), g.n_most) for g in guesses]


def look_up(tokens: NDArray[np.int32], n_most: int) -> list[int]:
    """Tokens after the last earlier occurrence of the end of `tokens`; empty if there is none."""
    for n in _NGRAMS:
        if len(tokens) <= n:
            continue
        end = tokens[-n:]
        candidates = np.flatnonzero(tokens[n - 1 : -1] == end[-1])[::-1]  # ends of windows
        for start in candidates:
            if np.array_equal(tokens[start : start + n], end):
                following = tokens[start + n : start + n + n_most]
                return [int(token) for token in following]
    return []


def next_draft_length(n_drafted: int, n_accepted: int, n_most: int) -> int:
    """How many tokens to guess next: one more after a full hit, no more than hit after a miss."""
    return max(1, min(n_most, n_accepted + (n_accepted == n_drafted)))
