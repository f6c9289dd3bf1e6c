"""How long a reply may think: a named level, or a budget of tokens."""

from __future__ import annotations

from dataclasses import dataclass

from nanorun.errors import UsageError


@dataclass(frozen=True, slots=True)
class Think:
    """A reasoning depth."""

    budget: int | None
    """Thinking tokens; None for no limit."""
    level: str | None = None
    """The name in `LEVELS` that was asked for; None if a number was."""

    @classmethod
    def parse(cls, value: str | int) -> Think:
        """The depth that a level's name or a number of tokens means.

        Raises:
            UsageError: If it is neither.
        """
        text = str(value).strip().lower()
        if text in LEVELS:
            return LEVELS[text]
        if text.isdecimal():
            return cls(int(text))
        raise UsageError(
            f"reasoning depth {value!r} is not known",
            facts=[f"it is one of {', '.join(LEVELS)}, or a number of tokens"],
        )

    @property
    def is_off(self) -> bool:
        """Whether the reply is to begin with its answer."""
        return self.budget == 0

    def __str__(self) -> str:
        return self.level or str(self.budget)


OFF = Think(0, "off")
LOW = Think(512, "low")
MEDIUM = Think(4096, "medium")
HIGH = Think(16384, "high")
MAX = Think(None, "max")
LEVELS = {str(think): think for think in (OFF, LOW, MEDIUM, HIGH, MAX)}
"""The levels of every family, from the least to the most."""


def grace_tokens(budget: int) -> int:
    """Tokens past the budget within which a line or sentence may end: max(10 %, 32)."""
    return max(budget // 10, 32)
