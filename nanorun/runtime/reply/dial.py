"""The reasoning dial: how long a reply may think, as a pure state machine.

Tokens go in (`observe`), forced tokens come out (`forced`); nothing here knows the engine. At the
budget the thinking is not cut in mid-word: it may finish its line or sentence within a grace
window, then the closing tokens are forced, and the answer follows. NVIDIA's own clients do the
same (model card: end at the next newline after the budget, hard stop some hundred tokens later).
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from enum import Enum

from nanorun.model.think import Think, grace_tokens

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


class Phase(Enum):
    """Where a reply is."""

    THINKING = "thinking"
    LANDING = "landing"
    """Over budget; waits for the end of a line or sentence."""
    CLOSING = "closing"
    """The closing tokens are being forced."""
    ANSWER = "answer"


class ReasoningDial:
    r"""Limits the thinking of one reply.

    Args:
        budget: Thinking tokens allowed; None for no limit.
        thinking: Whether the reply starts inside thinking (the prompt opened it).
        close_after_text: Tokens that end thinking where text stands before them (`\n</think>\n`).
        close_after_newline: The same where a line has just ended (`</think>\\n`).
        max_reply: Tokens the whole reply can have. Thinking gets half of them at most, and its
            grace a quarter, so that the rest can hold an answer.
    """

    def __init__(
        self,
        budget: int | None,
        *,
        thinking: bool,
        close_after_text: Sequence[int],
        close_after_newline: Sequence[int],
        max_reply: int | None = None,
    ) -> None:
        self.phase = Phase.THINKING if thinking else Phase.ANSWER
        self.n_thinking = 0
        self.was_closed = False
        """Whether thinking did not end by itself."""
        self._max_reply = max_reply
        self._budget = self._capped(budget)
        self._close_after_text = tuple(close_after_text)
        self._close_after_newline = tuple(close_after_newline)
        self._queue: deque[int] = deque()
        self._tail = b"\n"
        if thinking:
            self._check()

    def forced(self) -> int | None:
        """The token that must come next instead of a sampled one, if any."""
        return self._queue[0] if self._queue else None

    def observe(self, piece: bytes, *, in_thinking: bool) -> None:
        """Take note of the token that was appended, sampled or forced.

        Args:
            piece: Its bytes.
            in_thinking: Whether the reply, read as the parser reads it, is still thinking.
        """
        if self._queue:
            self._queue.popleft()
            if not self._queue:
                self.phase = Phase.ANSWER
            return
        if not in_thinking:
            self.phase = Phase.ANSWER
            return
        if self.phase is Phase.ANSWER:
            # What looked like a tool call was none, or the model opened its thinking again.
            self.phase = Phase.THINKING
        self.n_thinking += 1
        self._tail = (self._tail + piece)[-8:]
        self._check()

    def rescue(self) -> bool:
        """Close thinking in place of an end of turn; False when there was none to close.

        Some replies end while still thinking. Their reader would get no answer at all.
        """
        if self.phase in (Phase.THINKING, Phase.LANDING):
            self._close()
            return True
        return False

    def finish_thinking(self) -> None:
        """End the thinking at the next line or sentence ("answer now")."""
        self.set_budget(0)

    def set_budget(self, budget: int | None) -> None:
        """Change the budget while the reply thinks; no effect once it answers.

        One that is used up already ends the thinking at the next line or sentence.
        """
        if budget is not None:
            # Landing goes on from where it began, or repeating this would put off its end.
            began = self._budget if self.phase is Phase.LANDING else None
            budget = max(budget, self.n_thinking if began is None else began)
        self._budget = self._capped(budget)
        if self.phase is Phase.LANDING:
            self.phase = Phase.THINKING
        if self.phase is Phase.THINKING:
            self._check()

    def _capped(self, budget: int | None) -> int | None:
        if self._max_reply is None:
            return budget
        half = self._max_reply // 2
        return half if budget is None else min(budget, half)

    def _grace(self, budget: int) -> int:
        grace = grace_tokens(budget)
        return grace if self._max_reply is None else min(grace, self._max_reply // 4)

    def _check(self) -> None:
        if self._budget is None or self.n_thinking < self._budget:
            return
        self.phase = Phase.LANDING
        over, grace = self.n_thinking - self._budget, self._grace(self._budget)
        at_end = self.n_thinking == 0 or _ENDS_SENTENCE.search(self._tail)
        if self._budget == 0 or at_end or over >= grace - 4:
            # A character of several bytes is completed first; it has at most four.
            if not _is_utf8_complete(self._tail) and over < grace_tokens(self._budget):
                return
            self._close()

    def _close(self) -> None:
        ends_line = self._tail.endswith(b"\n")
        self._queue.extend(self._close_after_newline if ends_line else self._close_after_text)
        self.phase = Phase.CLOSING
        self.was_closed = True


def _is_utf8_complete(tail: bytes) -> bool:
    """Whether a byte string ends on a character border (or is not UTF-8 at all)."""
    for back in range(1, min(4, len(tail)) + 1):
        byte = tail[-back]
        if byte & 0xC0 == 0x80:  # continuation byte
            continue
        length = 1 if byte < 0x80 else 2 if byte >> 5 == 6 else 3 if byte >> 4 == 14 else 4
        return back >= length
    return True
