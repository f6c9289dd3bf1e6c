"""Holding a reply's thinking to a budget that its endpoint does not hold it to."""

from __future__ import annotations

from nanorun.runtime.reply.dial import Phase, ReasoningDial


class Landing:
    """Counts the pieces of a stream as the engine's dial counts tokens, and lands as it does.

    Args:
        budget: Pieces of thinking allowed; None for no limit.
        max_reply: Tokens the whole reply can have; None if that is not known.
    """

    def __init__(self, budget: int | None, max_reply: int | None) -> None:
        # The dial forces tokens where it has the engine; here that it wants to is all that counts.
        self._dial = ReasoningDial(
            budget,
            thinking=True,
            close_after_text=(0,),
            close_after_newline=(0,),
            max_reply=max_reply,
        )

    @property
    def is_due(self) -> bool:
        """Whether the thinking has to end now."""
        return self._dial.phase is Phase.CLOSING

    def set_budget(self, n_tokens: int | None) -> None:
        """Change the budget; one that is used up ends the thinking at the next line or sentence."""
        self._dial.set_budget(n_tokens)

    def observe(self, piece: str, *, in_thinking: bool) -> None:
        """Count a piece, after which the reply goes on thinking or has begun to answer."""
        if not self.is_due:
            self._dial.observe(piece.encode("utf-8", "replace"), in_thinking=in_thinking)
