"""Guesses from the text itself: what followed the last few tokens before will follow them again.

It costs nothing and pays where a reply repeats its prompt: code, quotations, tool results
("prompt lookup decoding", A. Saxena 2023).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nanorun.runtime.drafting.drafter import DraftRequest

# Tokens whose last occurrence is looked for, the longest first.
_NGRAMS = (4, 3)


class LookupDrafter:
    """Looks in a sequence for its own end."""

    def draft(self, requests: Sequence[DraftRequest]) -> list[list[int]]:
        """What followed the last occurrence of each sequence's end."""
        return [look_up(np.append(r.tokens, r.pending), r.n_most) for r in requests]


def look_up(tokens: NDArray[np.int32], n_most: int) -> list[int]:
    """Tokens after the last earlier occurrence of the end of `tokens`; empty if there is none.

    Args:
        tokens: A sequence, shape `(n_tokens,)`.
        n_most: Tokens to give.
    """
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
