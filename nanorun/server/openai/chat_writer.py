"""A reply's events as OpenAI's objects: one `chat.completion`, or chunks of it.

The thinking is given under one name, since openai-agents and litellm show it twice where it has
two: `reasoning` (vLLM, OpenRouter) unless the settings say `reasoning_content` (llama.cpp,
DeepSeek) or both.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from nanorun.model.chat import (
    Event,
    Finished,
    TextDelta,
    ThinkingDelta,
    ToolArguments,
    ToolCall,
    ToolCallBegun,
    ToolCallDelta,
    arguments_text,
)
from nanorun.server import sse
from nanorun.server.asked import Asked
from nanorun.server.errors import ApiError
from nanorun.server.openai.likelihoods import token_object
from nanorun.server.openai.usage import summed_usage, usage_object
from nanorun.server.settings import ServerSettings
from nanorun.server.writer import SseWriter


def _call_object(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": arguments_text(call)}
    return {"id": call.id, "type": "function", "function": function}


class ChatWriter(SseWriter):
    """One completion in the making; its chunks share an id and a time.

    Args:
        model: The model's name towards clients.
        asked: The question.
        settings: What the server allows.
        include_usage: Whether a stream ends with the usage.
        hides_thinking: Whether the thinking stays here.
    """

    def __init__(
        self,
        model: str,
        asked: Asked,
        settings: ServerSettings,
        *,
        include_usage: bool = False,
        hides_thinking: bool = False,
    ) -> None:
        super().__init__(asked.n, asked.notices)
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self._model = model
        self._created = int(time.time())
        self._thinking_fields = () if hides_thinking else settings.thinking_fields
        self._include_usage = include_usage
        self._n_logprobs_given = [0] * asked.n
        self._sent_arguments: dict[tuple[int, int], str] = {}
        """What was sent of the arguments of each call, by answer and index."""

    def whole(self) -> dict[str, Any]:
        """The whole completion, once it has finished."""
        made = {
            **self._head("chat.completion"),
            "choices": [self._choice(i) for i in range(len(self.replies))],
            "usage": self._usage(),
            "timings": asdict(self.finished().timings),
        }
        return {**made, "notices": self.notices} if self.notices else made

    def _choice(self, i: int) -> dict[str, Any]:
        so_far, finished = self.replies[i], self.finished(i)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if so_far.calls and not so_far.answer else so_far.answer,
        }
        if finished.refusal is not None:
            message["refusal"] = finished.refusal
        if so_far.thinking:
            message |= self._reasoning(so_far.thinking)
        if so_far.tool_calls:
            message["tool_calls"] = [_call_object(call) for call in so_far.tool_calls]
        return {
            "index": i,
            "message": message,
            "logprobs": self._take_logprobs(i),
            "finish_reason": self._reason(i, finished),
        }

    def opening(self) -> Iterator[bytes]:
        """The chunks that say who speaks, after comments on how the request was taken."""
        for notice in self.notices:
            yield sse.comment(f"notice: {notice}")
        for i in range(len(self.replies)):
            yield self._chunk(i, {"role": "assistant", "content": None})

    def write_event(self, i_choice: int, event: Event) -> Iterable[bytes]:
        """The chunk of an event that was just taken."""
        match event:
            case ThinkingDelta(text):
                reasoning = self._reasoning(text)
                return [self._chunk(i_choice, reasoning)] if reasoning else []
            case TextDelta(text):
                return [self._chunk(i_choice, {"content": text})]
            case ToolCallBegun(index, id, name):
                return [self._begin_call(i_choice, index, id, name)]
            case ToolArguments(index, text):
                return [self._call_chunk(i_choice, index, text)]
            case ToolCallDelta():
                return self._end_call(i_choice, event)
            case Finished():
                return [self._last_chunk(i_choice, event)]
        return []

    def _begin_call(self, i: int, index: int, id: str, name: str) -> bytes:
        self._sent_arguments[i, index] = ""
        function = {"name": name, "arguments": ""}
        call = {"index": index, "id": id, "type": "function", "function": function}
        return self._chunk(i, {"tool_calls": [call]})

    def _call_chunk(self, i: int, index: int, text: str) -> bytes:
        self._sent_arguments[i, index] += text
        call = {"index": index, "function": {"arguments": text}}
        return self._chunk(i, {"tool_calls": [call]})

    def _end_call(self, i: int, event: ToolCallDelta) -> Iterator[bytes]:
        """What of a call was not sent yet; nothing of one that broke off."""
        index, call = event.index, event.call
        if (i, index) not in self._sent_arguments:
            yield self._begin_call(i, index, call.id, call.name)
        sent, whole = self._sent_arguments[i, index], arguments_text(call)
        if whole.startswith(sent) and whole != sent:
            yield self._call_chunk(i, index, whole[len(sent) :])

    def _last_chunk(self, i: int, finished: Finished) -> bytes:
        refusal = {} if finished.refusal is None else {"refusal": finished.refusal}
        last = self._chunk_object(i, refusal, self._reason(i, finished))
        if finished.stop_text is not None:
            last["choices"][0]["stop_reason"] = finished.stop_text  # vLLM's name for it
        return sse.encode({**last, "timings": asdict(finished.timings)})

    def closing(self) -> Iterator[bytes]:
        """The usage, if `stream_options.include_usage` asks for it, and the end."""
        if self._include_usage:
            usage = {
                **self._head("chat.completion.chunk"),
                "choices": [],
                "usage": self._usage(),
                "timings": asdict(self.finished().timings),
            }
            yield sse.encode(usage)
        yield sse.DONE

    def failure(self, error: ApiError) -> Iterable[bytes]:
        """The error's body as the last event; no `[DONE]` follows."""
        return [sse.encode(error.body())]

    def _usage(self) -> dict[str, Any]:
        usages = [self.finished(i).usage for i in range(len(self.replies))]
        return usage_object(summed_usage(usages, n_each=len(usages)))

    def _reasoning(self, text: str) -> dict[str, str]:
        return dict.fromkeys(self._thinking_fields, text)

    def _chunk(self, i: int, delta: dict[str, Any]) -> bytes:
        return sse.encode(self._chunk_object(i, delta))

    def _chunk_object(
        self, i: int, delta: dict[str, Any], reason: str | None = None
    ) -> dict[str, Any]:
        choice = {
            "index": i,
            "delta": delta,
            "logprobs": self._take_logprobs(i),
            "finish_reason": reason,
        }
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _reason(self, i: int, finished: Finished) -> str:
        """OpenAI's word for how the reply ended.

        It has none for one that was stopped from outside, and clients that read `tool_calls` look
        for calls, which there are none of if no call could be read.
        """
        has_none = finished.reason == "tool_calls" and not self.replies[i].calls
        return "stop" if has_none or finished.reason == "cancelled" else finished.reason

    def _take_logprobs(self, i: int) -> dict[str, Any] | None:
        """Those of the answer's tokens that were not given yet."""
        fresh = self.replies[i].logprobs[self._n_logprobs_given[i] :]
        self._n_logprobs_given[i] += len(fresh)
        entries = [token_object(token) for token in fresh if not token.in_thinking]
        return {"content": entries, "refusal": None} if entries else None

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}
