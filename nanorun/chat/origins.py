"""Where the text that comes out of a reply stood in it: what a parser leaves out is nowhere."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Stretch:
    """Characters of a reply that came out as text, all that lie between two places."""

    start: int
    """Characters of the reply before it."""
    end: int
    in_thinking: bool


@dataclass(slots=True)
class Origins:
    """What a parser has read, and what of it came out."""

    n_read: int = 0
    """Characters of the reply that were read, tags and what is held back included."""
    stretches: list[Stretch] = field(default_factory=list)
    """What came out so far, in the order of the reply."""

    def note(self, start: int, n_chars: int, *, in_thinking: bool) -> None:
        """Characters from `start` on come out."""
        if not n_chars:
            return
        last = self.stretches[-1] if self.stretches else None
        if last is not None and last.end == start and last.in_thinking is in_thinking:
            last.end += n_chars
        else:
            self.stretches.append(Stretch(start, start + n_chars, in_thinking))
