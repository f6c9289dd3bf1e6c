"""Requests that wait, in the order in which they are admitted."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from typing import Generic

from nanorun.runtime.engine.scheduler import S
from nanorun.runtime.engine.sequence import Sequence

# Those at the head are looked at in a step, so that a step costs the same however many wait. More
# than one is looked at because some wait for a leader, or for room that others do not need.
_MOST_LOOKED_AT = 64
# Short requests that may be admitted before a long one for which there is no room yet.
MOST_OVERTAKING = 16
# A request is short beside one whose prompt is so many times as long.
_MUCH_LONGER = 4


class Waiting(Generic[S]):
    """The queue: by priority, then first come, first served."""

    def __init__(self) -> None:
        self._sequences: list[S] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[S]:
        """All of them; a copy, so that other threads may look while the queue changes."""
        return iter(tuple(self._sequences))

    def __contains__(self, sequence: S) -> bool:
        return sequence in self._sequences

    def add(self, sequence: S) -> None:
        """Queue a request; one that was suspended comes before those that came after it."""
        insort(self._sequences, sequence, key=lambda other: other.turn)

    def remove(self, sequence: S) -> None:
        """Take a request out."""
        self._sequences.remove(sequence)

    def head(self) -> list[S]:
        """Those that may be admitted now, in their order."""
        return self._sequences[:_MOST_LOOKED_AT]


def may_overtake(sequence: Sequence, blocked: Sequence) -> bool:
    """Whether a request may be admitted before an earlier one that there is no room for.

    It may if it is short, for it will hardly delay the long one; and only so often, because the
    room that many short ones take is never free at once.
    """
    if sequence.turn[:2] != blocked.turn[:2]:  # it would have to give way again at once
        return False
    is_short = len(sequence.prompt) * _MUCH_LONGER <= len(blocked.prompt)
    return is_short and blocked.n_overtaken < MOST_OVERTAKING
