"""A reply's events as Ollama's lines of JSON."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, ClassVar, Literal

from nanorun.model.chat import Event, Finished, TextDelta, ThinkingDelta, ToolCall, ToolCallDelta
from nanorun.server.asked import Asked
from nanorun.server.errors import ApiError, ollama_body
from nanorun.server.writer import Writer

_NS = 1_000_000_000


class OllamaWriter(Writer):
    """One answer in the making.

    Args:
        model: The name that the client asked for.
        asked: The question.
        kind: The route: a message, or text.
    """

    media_type: ClassVar[str] = "application/x-ndjson"

    def __init__(self, model: str, asked: Asked, kind: Literal["chat", "generate"]) -> None:
        super().__init__(1, asked.notices)
        self.id = f"ollama-{secrets.token_hex(8)}"
        self._model = model
        self._kind = kind
        self._started = time.monotonic_ns()

    def opening(self) -> Iterable[bytes]:
        """Nothing: each line says all."""
        return []

    def write(self, i_choice: int, event: Event) -> Iterable[bytes]:
        """The line of an event that was just taken."""
        match event:
            case ThinkingDelta(text):
                return [self._line(thinking=text)]
            case TextDelta(text):
                return [self._line(text)]
            case ToolCallDelta(call=call):
                return [self._line(calls=[call])]
            case Finished():
                return [_encode(self._last(""))]
        return []

    def closing(self) -> Iterable[bytes]:
        """Nothing: the last line says that it is the last."""
        return []

    def failure(self, error: ApiError) -> Iterable[bytes]:
        """A line that clients raise."""
        return [_encode(ollama_body(error))]

    def pause(self, why: str) -> bytes:
        """A line without text, which adds nothing to an answer."""
        return self._line()

    def whole(self) -> dict[str, Any]:
        """The whole answer, once it has finished."""
        reply = self.replies[0]
        made = self._last(reply.answer, reply.thinking, reply.tool_calls)
        return {**made, "notices": self.notices} if self.notices else made

    def _line(
        self, text: str = "", thinking: str = "", calls: list[ToolCall] | None = None
    ) -> bytes:
        return _encode({**self._said(text, thinking, calls or []), "done": False})

    def _said(self, text: str, thinking: str, calls: list[ToolCall]) -> dict[str, Any]:
        head = {"model": self._model, "created_at": datetime.now(UTC).isoformat()}
        thought = {"thinking": thinking} if thinking else {}
        if self._kind == "generate":
            return {**head, "response": text, **thought}
        message: dict[str, Any] = {"role": "assistant", "content": text, **thought}
        if calls:
            message["tool_calls"] = [
                {"id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
                for call in calls
            ]
        return {**head, "message": message}

    def _last(
        self, text: str, thinking: str = "", calls: list[ToolCall] | None = None
    ) -> dict[str, Any]:
        finished = self.finished()
        usage, timings = finished.usage, finished.timings
        return {
            **self._said(text, thinking, calls or []),
            "done": True,
            "done_reason": "length" if finished.reason == "length" else "stop",
            "total_duration": time.monotonic_ns() - self._started,
            "load_duration": 0,
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": round(timings.prefill_s * _NS),
            "eval_count": usage.completion_tokens,
            "eval_duration": round(timings.decode_s * _NS),
        }


def _encode(line: dict[str, Any]) -> bytes:
    return json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
