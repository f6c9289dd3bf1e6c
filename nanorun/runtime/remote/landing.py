"""Holding a reply's thinking to a budget that its endpoint does not hold it to."""

from __future__ import annotations

from nanorun.runtime.reply.dial import ReasoningDial
from nanorun.runtime.reply.phase import Phase


class Landing:
    """Counts the pieces of a stream as the engine's dial counts tokens, and lands as it does.

    Args:
        budget: Pieces of thinking allowed; None for no limit.
        max_reply: Tokens the whole reply can have; None if that is not known.
    """

    def __init__(self, budget: int | None, max_reply: int | None) -> None:
        self._dial = ReasoningDial(budget, max_reply=max_reply)

    def set_budget(self, n_tokens: int | None) -> None:
        """Change the budget; one that is used up ends the thinking at the next line or sentence."""
        self._dial.set_budget(n_tokens)

    def is_due_after(self, piece: str, *, in_thinking: bool) -> bool:
        """Count a piece; whether the thinking has to end now.

        Args:
            piece: Its text.
            in_thinking: Whether the reply still thinks after it.
        """
        if not in_thinking:
            return False
        if self._dial.asks_for is not Phase.CLOSING:
            self._dial.take(piece.encode("utf-8", "replace"))
        return self._dial.asks_for is Phase.CLOSING
