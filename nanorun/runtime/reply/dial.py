"""The reasoning dial: how long a reply may think.

It counts thinking tokens and says what its budget asks for; `Reply` acts on that. At the budget the
thinking is not cut in mid-word: it may finish its line or sentence within a grace window, then it
is closed, and the answer follows. NVIDIA's own clients do the same (model card: end at the next
newline after the budget, hard stop some hundred tokens later).
"""

from __future__ import annotations

import re

from nanorun.model.think import Think, grace_tokens
from nanorun.runtime.reply.phase import Phase

# Families whose template can ask for less thinking take that as well as the budget: Super knows
# `low_effort`, Ultra `medium_effort` (model cards). Nano has neither.
_EFFORTS = {"low": ("low_effort", "medium_effort"), "medium": ("medium_effort",)}


def template_effort(think: Think, template: str) -> dict[str, bool]:
    """Variables by which a chat template is told of a level, for families that have them.

    Args:
        think: The reasoning depth; a budget without a level is only a budget.
        template: The template's source.
    """
    names = _EFFORTS.get(think.level or "", ())
    known = [name for name in names if re.search(rf"\b{name}\b", template)]
    return dict.fromkeys(known[:1], True)


# A line, or a sentence whose full stop is not a decimal point.
_ENDS_SENTENCE = re.compile(rb"(\n|(?<!\d)\.|[!?])$")


class ReasoningDial:
    """Limits the thinking of one reply.

    Args:
        budget: Thinking tokens allowed; None for no limit.
        max_reply: Tokens the whole reply can have; None for no limit. Thinking gets half of them at
            most, and its grace a quarter, so that the rest can hold an answer.
        begun: Thinking that is there already and not counted; none if it begins on a new line.
    """

    def __init__(
        self, budget: int | None, *, max_reply: int | None = None, begun: bytes = b""
    ) -> None:
        self.n_thinking = 0
        """Thinking tokens so far."""
        self._max_reply = max_reply
        self._budget = self._capped(budget)
        self._tail = (b"\n" + begun)[-8:]

    def take(self, piece: bytes) -> None:
        """Count a thinking token, given its bytes."""
        self.n_thinking += 1
        self._tail = (self._tail + piece)[-8:]

    @property
    def asks_for(self) -> Phase:
        """What the budget asks of thinking that is open: THINKING, LANDING or CLOSING."""
        if self._budget is None or self.n_thinking < self._budget:
            return Phase.THINKING
        over, grace = self.n_thinking - self._budget, self._grace(self._budget)
        at_end = self.n_thinking == 0 or _ENDS_SENTENCE.search(self._tail)
        if not (self._budget == 0 or at_end or over >= grace - 4):
            return Phase.LANDING
        # A character of several bytes is completed first; it has at most four.
        if not _is_utf8_complete(self._tail) and over < grace_tokens(self._budget):
            return Phase.LANDING
        return Phase.CLOSING

    @property
    def ends_line(self) -> bool:
        """Whether the thinking so far ends with a line break, or there is none."""
        return self._tail.endswith(b"\n")

    def set_budget(self, budget: int | None) -> None:
        """Change the budget; one that is used up lets the thinking end its line or sentence."""
        if budget is not None:
            # Landing goes on from where it began, or repeating this would put off its end.
            began = self.n_thinking if self._budget is None else self._budget
            budget = max(budget, min(began, self.n_thinking))
        self._budget = self._capped(budget)

    def _capped(self, budget: int | None) -> int | None:
        if self._max_reply is None:
            return budget
        half = self._max_reply // 2
        return half if budget is None else min(budget, half)

    def _grace(self, budget: int) -> int:
        grace = grace_tokens(budget)
        return grace if self._max_reply is None else min(grace, self._max_reply // 4)


def _is_utf8_complete(tail: bytes) -> bool:
    """Whether a byte string ends on a character border (or is not UTF-8 at all)."""
    for back in range(1, min(4, len(tail)) + 1):
        byte = tail[-back]
        if byte & 0xC0 == 0x80:  # continuation byte
            continue
        length = 1 if byte < 0x80 else 2 if byte >> 5 == 6 else 3 if byte >> 4 == 14 else 4
        return back >= length
    return True
