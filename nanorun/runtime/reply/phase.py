"""Where a reply is; `Reply` alone moves it."""

from __future__ import annotations

from enum import Enum


class Phase(Enum):
    """Where a reply is."""

    THINKING = "thinking"
    LANDING = "landing"
    """Over budget; waits for the end of a line or sentence."""
    CLOSING = "closing"
    """The tokens that end its thinking are being forced."""
    ANSWERING = "answering"
    CALLING = "calling"
    """Within a tool call."""
    ENDED = "ended"
