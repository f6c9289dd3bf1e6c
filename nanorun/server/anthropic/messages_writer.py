"""A reply's events as Anthropic's: one `message`, or the events of a stream that build it."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from typing import Any

from nanorun.model.chat import (
    Event,
    Finished,
    TextDelta,
    ThinkingDelta,
    ToolArguments,
    ToolCallBegun,
    ToolCallDelta,
    Usage,
    arguments_text,
)
from nanorun.server import sse
from nanorun.server.asked import Asked
from nanorun.server.errors import ApiError, anthropic_body
from nanorun.server.writer import SseWriter

_SIGNATURE = "nanorun"
"""Of thinking blocks: clients give it back, and nobody here checks it."""
_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}
_DELTAS = {
    "text": ("text_delta", "text"),
    "thinking": ("thinking_delta", "thinking"),
    "tool_use": ("input_json_delta", "partial_json"),
}


class MessagesWriter(SseWriter):
    """One message in the making.

    Args:
        model: The model's name towards clients.
        asked: The question.
        shows_thinking: Whether its thinking is part of it.
    """

    def __init__(self, model: str, asked: Asked, *, shows_thinking: bool = True) -> None:
        super().__init__(1, asked.notices)
        self.id = f"msg_{secrets.token_hex(12)}"
        self._model = model
        self._shows_thinking = shows_thinking
        self._n_blocks = 0
        self._open: str | None = None
        """What the block that is being written is."""
        self._sent = ""
        """What was written of the arguments of the call that is being written."""

    def whole(self) -> dict[str, Any]:
        """The whole message, once it has finished."""
        finished = self.finished()
        made = {
            **self._head(),
            "content": self._blocks(),
            "stop_reason": self._reason(finished),
            "stop_sequence": finished.stop_text,
            "usage": usage_object(finished.usage),
        }
        return {**made, "notices": self.notices} if self.notices else made

    def _blocks(self) -> list[dict[str, Any]]:
        reply = self.replies[0]
        blocks: list[dict[str, Any]] = []
        if reply.thinking and self._shows_thinking:
            blocks.append({"type": "thinking", "thinking": reply.thinking, "signature": _SIGNATURE})
        if reply.answer or not reply.tool_calls:
            blocks.append({"type": "text", "text": reply.answer})
        for call in reply.tool_calls:
            blocks.append(
                {"type": "tool_use", "id": call.id, "name": call.name, "input": call.arguments}
            )
        return blocks

    def opening(self) -> Iterator[bytes]:
        """The message's beginning, without content, after comments on how it was taken."""
        for notice in self.notices:
            yield sse.comment(f"notice: {notice}")
        message = {**self._head(), "content": [], "stop_reason": None, "stop_sequence": None}
        yield _event("message_start", message={**message, "usage": usage_object(Usage())})

    def write_event(self, i_choice: int, event: Event) -> Iterable[bytes]:
        """What a stream says of an event that is part of the message."""
        match event:
            case ThinkingDelta(text) if self._shows_thinking:
                empty = {"type": "thinking", "thinking": "", "signature": ""}
                return self._say("thinking", empty, text)
            case TextDelta(text):
                return self._say("text", {"type": "text", "text": ""}, text)
            case ToolCallBegun(id=id, name=name):
                return self._begin_call(id, name)
            case ToolArguments(text=text):
                return [self._arguments(text)]
            case ToolCallDelta():
                return self._end_call(event)
            case Finished():
                return self._finish(event)
        return []

    def _say(self, kind: str, empty: dict[str, Any], text: str) -> Iterator[bytes]:
        """A piece of text, in a block of its kind that begins where there is none."""
        if self._open != kind:
            yield from self._begin(kind, empty)
        yield self._delta(kind, text)

    def _begin(self, kind: str, empty: dict[str, Any]) -> Iterator[bytes]:
        yield from self._end_block()
        self._open = kind
        yield _event("content_block_start", index=self._n_blocks, content_block=empty)

    def _delta(self, kind: str, text: str) -> bytes:
        name, field = _DELTAS[kind]
        delta = {"type": name, field: text}
        return _event("content_block_delta", index=self._n_blocks, delta=delta)

    def _end_block(self) -> Iterator[bytes]:
        if self._open is None:
            return
        if self._open == "thinking":
            delta = {"type": "signature_delta", "signature": _SIGNATURE}
            yield _event("content_block_delta", index=self._n_blocks, delta=delta)
        yield _event("content_block_stop", index=self._n_blocks)
        self._open = None
        self._n_blocks += 1

    def _begin_call(self, id: str, name: str) -> Iterator[bytes]:
        self._sent = ""
        yield from self._begin(
            "tool_use", {"type": "tool_use", "id": id, "name": name, "input": {}}
        )

    def _arguments(self, text: str) -> bytes:
        self._sent += text
        return self._delta("tool_use", text)

    def _end_call(self, event: ToolCallDelta) -> Iterator[bytes]:
        """What of a call was not sent yet; nothing of one that broke off."""
        if self._open != "tool_use":
            yield from self._begin_call(event.call.id, event.call.name)
        whole = arguments_text(event.call)
        if whole.startswith(self._sent) and whole != self._sent:
            yield self._arguments(whole[len(self._sent) :])
        yield from self._end_block()

    def _finish(self, finished: Finished) -> Iterator[bytes]:
        if self._open is None and not self._n_blocks:
            yield from self._begin("text", {"type": "text", "text": ""})
        yield from self._end_block()
        delta = {"stop_reason": self._reason(finished), "stop_sequence": finished.stop_text}
        yield _event("message_delta", delta=delta, usage=usage_object(finished.usage))
        yield _event("message_stop")

    def closing(self) -> Iterable[bytes]:
        """Nothing: `message_stop` ended it."""
        return []

    def failure(self, error: ApiError) -> Iterable[bytes]:
        """The event that becomes an exception in clients."""
        return [sse.encode(anthropic_body(error), "error")]

    def pause(self, why: str) -> bytes:
        """Anthropic's own sign of life, before and within the message."""
        return _event("ping")

    def _reason(self, finished: Finished) -> str:
        if finished.stop_text is not None:
            return "stop_sequence"
        if finished.reason == "tool_calls" and not self.replies[0].calls:
            return "end_turn"  # no call could be read
        return _REASONS.get(finished.reason, "end_turn")

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "type": "message", "role": "assistant", "model": self._model}


def usage_object(usage: Usage) -> dict[str, Any]:
    """What a message cost: Anthropic counts tokens that were reused apart from the others.

    What was read is kept for later prompts, whether or not a block asks for it (`cache_control`).
    """
    read = usage.prompt_tokens - usage.cached_tokens
    return {
        "input_tokens": read,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
    }


def _event(kind: str, **fields: Any) -> bytes:
    return sse.encode({"type": kind, **fields}, kind)
