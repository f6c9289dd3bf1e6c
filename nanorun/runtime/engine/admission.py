"""What waiting prompts can start from, and whom they should wait for: worked out once.

Requests wait for many steps, and each step delays those that run. So a waiting prompt is compared
with the sequences that are held only when these changed, and with each running prompt once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic

from nanorun.runtime.engine.scheduler import S
from nanorun.runtime.prompt_state.branch import Match
from nanorun.runtime.prompt_state.prefix_tree import PrefixTree
from nanorun.runtime.prompt_state.prefixes import Tokens, n_common

# Fewer shared tokens than this are cheaper to read twice than to wait for.
MIN_SHARED_TOKENS = 64


@dataclass(slots=True)
class _Waiting(Generic[S]):
    """What is known of a sequence that waits."""

    match: Match | None = None
    shared: dict[S, tuple[Tokens, int]] = field(default_factory=dict)
    """Running sequences' prompts, and the tokens that the waiting one shares with them."""


class Admission(Generic[S]):
    """Looks up waiting sequences in the tree and among the prompts being read.

    Args:
        tree: The sequences held.
    """

    def __init__(self, tree: PrefixTree) -> None:
        self._tree = tree
        self._waiting: dict[S, _Waiting[S]] = {}

    def match(self, sequence: S) -> Match:
        """The place where a waiting prompt can start with the least to evaluate."""
        waiting = self._waiting.setdefault(sequence, _Waiting())
        waiting.match = self._tree.best_match(sequence.prompt, waiting.match)
        return waiting.match

    def leader(self, sequence: S, running: Sequence[S]) -> tuple[S, int] | None:
        """The running prefill that is about to read a prefix which a waiting prompt needs too.

        Args:
            sequence: Who waits.
            running: For whom it could wait.

        Returns:
            Who is to be waited for and the number of tokens it shares, or None if waiting gains
            nothing.
        """
        n_cached = self.match(sequence).n_tokens
        best: tuple[S, int] | None = None
        for other, n_shared in self._shared(sequence, [s for s in running if s.in_prefill]):
            gains = n_shared - n_cached >= MIN_SHARED_TOKENS
            if gains and other.n_evaluated < n_shared and (best is None or n_shared > best[1]):
                best = (other, n_shared)
        return best

    def _shared(self, sequence: S, running: Sequence[S]) -> list[tuple[S, int]]:
        """The tokens, the waiting prompt's last excepted, that it shares with each other prompt."""
        waiting = self._waiting[sequence]
        known, waiting.shared = waiting.shared, {}
        for other in running:
            prompt, n_shared = known.get(other, (None, 0))
            if prompt is not other.prompt:  # a suspension makes it longer
                prompt = other.prompt
                n_shared = min(n_common(sequence.prompt, prompt), len(sequence.prompt) - 1)
            waiting.shared[other] = prompt, n_shared
        return [(other, n_shared) for other, (_, n_shared) in waiting.shared.items()]

    def forget(self, sequence: S) -> None:
        """A sequence waits no more."""
        self._waiting.pop(sequence, None)
