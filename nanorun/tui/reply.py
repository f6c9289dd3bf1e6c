"""A reply on the screen: what of it is shown, its phase and its times. No widget here."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from nanorun.model.chat import (
    Event,
    Finished,
    PrefillProgress,
    TextDelta,
    ThinkingDelta,
    ToolArguments,
    ToolCallBegun,
    ToolCallDelta,
)
from nanorun.model.reply_so_far import ReplySoFar
from nanorun.tui.text import count_label, seconds_label

# A rate over fewer seconds jumps about.
_MIN_RATE_S = 0.3


class Phase(StrEnum):
    """Where a reply is."""

    QUEUED = "queued"
    """The model is still loading."""
    WAITING = "waiting"
    READING = "reading"
    THINKING = "thinking"
    ANSWERING = "answering"
    ENDED = "ended"


@dataclass(slots=True)
class Reply(ReplySoFar):
    """One reply: what it says so far, and how it goes.

    Args:
        clock: Seconds, for the durations shown.
    """

    clock: Callable[[], float] = time.monotonic
    phase: Phase = Phase.WAITING
    n_deltas: int = 0
    """Deltas so far: about one a token, until `finished` brings the exact count."""
    _thinking_shown: int = 0
    _answer_shown: int = 0
    _first_delta_at: float = 0.0
    _last_delta_at: float = 0.0
    _thinking_began_at: float = 0.0
    _thinking_s: float | None = None

    def take(self, event: Event) -> None:
        """Add the next event and note when it came."""
        ReplySoFar.take(self, event)
        match event:
            case PrefillProgress():
                self.phase = Phase.READING
            case ThinkingDelta():
                self._count_delta()
                if self.phase is not Phase.THINKING:
                    self.phase = Phase.THINKING
                    self._thinking_began_at = self._last_delta_at
            case TextDelta():
                self._count_delta()
                self._leave_thinking(Phase.ANSWERING)
            case ToolArguments():
                self._count_delta()
            case ToolCallBegun() | ToolCallDelta():
                self._leave_thinking(Phase.ANSWERING)
            case Finished():
                self.end()

    def end(self) -> None:
        """Nothing more comes, whether or not it was finished."""
        self._leave_thinking(Phase.ENDED)

    def take_thinking(self) -> str:
        """Thinking that arrived since the last call."""
        text = self.thinking[self._thinking_shown :]
        self._thinking_shown = len(self.thinking)
        return text

    def take_answer(self) -> str:
        """Answer that arrived since the last call."""
        text = self.answer[self._answer_shown :]
        self._answer_shown = len(self.answer)
        return text

    @property
    def thinking_s(self) -> float:
        """Seconds it has thought, or thought in all."""
        if self._thinking_s is not None:
            return self._thinking_s
        return self.clock() - self._thinking_began_at if self.phase is Phase.THINKING else 0.0

    @property
    def tps(self) -> float | None:
        """Tokens per second: the engine's own figure at the end, counted here until then."""
        if self.finished is not None and self.finished.timings.decode_tps > 0:
            return self.finished.timings.decode_tps
        span = self._last_delta_at - self._first_delta_at
        return (self.n_deltas - 1) / span if span >= _MIN_RATE_S else None

    @property
    def n_used(self) -> int:
        """Tokens of the context that the prompt and the reply fill."""
        if self.finished is not None and self.finished.usage.prompt_tokens:
            return self.finished.usage.prompt_tokens + self.finished.usage.completion_tokens
        return (self.prefill.n_done if self.prefill else 0) + self.n_deltas

    @property
    def has_answer(self) -> bool:
        """Whether there is something to remember as the assistant's turn."""
        return bool(self.answer.strip() or self.tool_calls)

    def facts(self) -> str:
        """One line on the state of the reply, or on how it went once it has ended."""
        match self.phase:
            case Phase.QUEUED:
                return "will be sent when the model is loaded"
            case Phase.WAITING:
                return "sent"
            case Phase.READING:
                return self._reading_facts()
            case Phase.ENDED:
                return self._ended_facts()
        return ""

    def _reading_facts(self) -> str:
        assert self.prefill is not None
        n_done, n_total = self.prefill.n_done, self.prefill.n_total
        return f"reading {count_label(n_done)} of {count_label(n_total)} tokens"

    def _ended_facts(self) -> str:
        facts = [self._end_fact()]
        if self.finished is not None and (n_tokens := self.finished.usage.completion_tokens):
            timings = self.finished.timings
            facts.append(f"{n_tokens:,} token{'s' if n_tokens != 1 else ''}")
            facts.append(seconds_label(timings.queue_s + timings.prefill_s + timings.decode_s))
        if self.tps is not None:
            facts.append(f"{self.tps:.1f} t/s")
        return " · ".join(fact for fact in facts if fact)

    def _end_fact(self) -> str:
        """How it ended, if not as usual."""
        if self.finished is not None and self.finished.reason == "length":
            return "cut off: the context is full"
        if self.finished is None or self.finished.reason == "cancelled":
            return "stopped" if self.has_answer else "stopped before it answered"
        return "" if self.has_answer else "an empty answer"

    def _count_delta(self) -> None:
        self._last_delta_at = self.clock()
        if not self.n_deltas:
            self._first_delta_at = self._last_delta_at
        self.n_deltas += 1

    def _leave_thinking(self, phase: Phase) -> None:
        if self.phase is Phase.THINKING:
            self._thinking_s = (self._thinking_s or 0.0) + self.clock() - self._thinking_began_at
        self.phase = phase
