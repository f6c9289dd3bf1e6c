"""What is known of one request while it is answered, for whoever looks after the endpoint.

The gate and the service write it; limits, the log, /slots and /metrics read it. No word of the
request or of its answer is in it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

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

Phase = Literal["waiting", "prefill", "thinking", "answer", "tool_call", "done"]

_PLACE = "nanorun.record"
_numbers = count(1)
_PHASES: dict[type[Event], Phase] = {
    ThinkingDelta: "thinking",
    TextDelta: "answer",
    ToolCallBegun: "tool_call",
    ToolArguments: "tool_call",
    ToolCallDelta: "tool_call",
}


@dataclass(slots=True, eq=False)
class AnswerRecord:
    """How far one answer is."""

    phase: Phase = "waiting"
    n_prompt: int = 0
    n_read: int = 0
    """Tokens of the prompt that are in the context, reused ones included."""
    n_reused: int = 0
    n_pieces: int = 0
    """Pieces of text so far, about one a token; the exact number comes with `finished`."""
    first_at: float | None = None
    """When the first of them came, as `time.monotonic` tells it."""
    finished: Finished | None = None

    def take(self, event: Event) -> None:
        """Note an event of the answer; its text is only counted."""
        if (phase := _PHASES.get(type(event))) is not None:
            self.phase = phase
            self.n_pieces += 1
            if self.first_at is None:
                self.first_at = time.monotonic()
        elif isinstance(event, PrefillProgress):
            self.phase = "prefill"
            self.n_prompt, self.n_read, self.n_reused = event.n_total, event.n_done, event.n_cached
        elif isinstance(event, Finished):
            self.phase = "done"
            self.finished = event

    @property
    def n_generated(self) -> int:
        """Tokens made: as the engine counted them, and about so many before it has."""
        if self.finished is not None and self.finished.usage.completion_tokens:
            return self.finished.usage.completion_tokens
        return self.n_pieces


@dataclass(slots=True, eq=False)
class RequestRecord:
    """One request."""

    method: str
    path: str
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    """Sent as `x-request-id`."""
    number: int = field(default_factory=lambda: next(_numbers))
    """Its place among all requests of this process."""
    started: float = field(default_factory=time.monotonic)
    key: str | None = None
    """The name of its key."""
    n_body_bytes: int = 0
    route: str | None = None
    """The route that answered it, with placeholders; None if there is none."""
    reply_id: str | None = None
    """The reply's id towards the client."""
    model: str | None = None
    """The name of the model that answers it, if it asks for an answer."""
    answers: list[AnswerRecord] = field(default_factory=list)
    status: int | None = None
    """The HTTP status; None if nothing was sent."""
    failure: str | None = None
    """The name of the error that ended it after its stream had begun."""
    ended: float | None = None

    @property
    def age_s(self) -> float:
        """Seconds since it came, or until it ended."""
        return (time.monotonic() if self.ended is None else self.ended) - self.started

    @property
    def first_token_s(self) -> float | None:
        """Seconds until the first token of any answer."""
        times = [answer.first_at for answer in self.answers if answer.first_at is not None]
        return min(times) - self.started if times else None


def record_of(scope: MutableMapping[str, Any]) -> RequestRecord:
    """The record of the request that an ASGI scope belongs to, begun when first asked for."""
    if _PLACE not in scope:
        scope[_PLACE] = RequestRecord(scope["method"], scope["path"])
    record: RequestRecord = scope[_PLACE]
    return record
