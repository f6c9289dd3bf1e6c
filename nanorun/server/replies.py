"""A reply's events as OpenAI's objects: one `chat.completion`, or chunks of it.

The thinking is given under both names in use, `reasoning_content` (llama.cpp, DeepSeek) and
`reasoning` (vLLM, OpenRouter), since clients look for one or the other.
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from nanorun.model.chat import (
    Event,
    Finished,
    ModelInfo,
    TextDelta,
    ThinkingDelta,
    TokenLogprobs,
    ToolCall,
    ToolCallDelta,
    Usage,
)


def model_object(name: str, info: ModelInfo, created: int) -> dict[str, Any]:
    """The model as /v1/models lists it, its context under vLLM's name and the rest in `meta`."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "nanorun",
        "max_model_len": info.n_ctx,
        "meta": {
            "n_ctx": info.n_ctx,
            "n_ctx_train": info.n_ctx_train,
            "n_params": info.n_params,
            "n_vocab": info.n_vocab,
            "size": info.file_bytes,
            "recipe": info.recipe,
        },
    }


def usage_object(usage: Usage) -> dict[str, Any]:
    """What a request cost."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cached_from": usage.cached_from,
        },
        "completion_tokens_details": {"reasoning_tokens": usage.thinking_tokens},
    }


def _logprob_object(piece: bytes, logprob: float) -> dict[str, Any]:
    return {"token": piece.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(piece)}


def _call_object(call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }


def _reasoning(text: str) -> dict[str, str]:
    return {"reasoning_content": text, "reasoning": text}


@dataclass
class Reply:
    """One completion in the making; its chunks share an id and a time."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    thinking: list[str] = field(default_factory=list)
    answer: list[str] = field(default_factory=list)
    tool_calls: list[ToolCall] = field(default_factory=list)
    """Calls that a client can make; unreadable ones are text."""
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    """Of the answer's tokens; in a stream those that are not sent yet."""
    finished: Finished | None = None

    def take(self, event: Event) -> None:
        """Add an event to the completion."""
        match event:
            case ThinkingDelta(text):
                self.thinking.append(text)
            case TextDelta(text):
                self.answer.append(text)
            case TokenLogprobs():
                self.take_logprobs(event)
            case ToolCallDelta(call=call, problem=problem) if not call.name:
                self.answer.append(problem or "")  # nothing a client could call
            case ToolCallDelta(call=call):
                self.tool_calls.append(call)
            case Finished():
                self.finished = event

    def take_logprobs(self, event: TokenLogprobs) -> None:
        """Keep a token's likelihood for the chunk or completion that it belongs to."""
        if not event.in_thinking:
            best = [_logprob_object(piece, p) for piece, p in event.alternatives]
            entry = _logprob_object(event.piece, event.logprob)
            self.logprobs.append({**entry, "top_logprobs": best})

    def completion(self) -> dict[str, Any]:
        """The whole completion, once it has finished."""
        assert self.finished is not None
        answer = "".join(self.answer)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if self.tool_calls and not answer else answer,
        }
        if self.finished.refusal is not None:
            message["refusal"] = self.finished.refusal
        if self.thinking:
            message |= _reasoning("".join(self.thinking))
        if self.tool_calls:
            message["tool_calls"] = [_call_object(call) for call in self.tool_calls]
        choice = {
            "index": 0,
            "message": message,
            "logprobs": self._take_logprobs(),
            "finish_reason": self._reason(self.finished),
        }
        return {
            **self._head("chat.completion"),
            "choices": [choice],
            "usage": usage_object(self.finished.usage),
            "timings": asdict(self.finished.timings),
        }

    def opening(self) -> dict[str, Any]:
        """The chunk that says who speaks."""
        return self._chunk({"role": "assistant", "content": ""})

    def chunk(self, event: ThinkingDelta | TextDelta | ToolCallDelta | Finished) -> dict[str, Any]:
        """The chunk of an event."""
        match event:
            case ThinkingDelta(text):
                return self._chunk(_reasoning(text))
            case TextDelta(text):
                return self._chunk({"content": text})
            case ToolCallDelta(call=call, problem=problem) if not call.name:
                return self._chunk({"content": problem or ""})
            case ToolCallDelta(call=call):
                self.tool_calls.append(call)
                numbered = {"index": len(self.tool_calls) - 1, **_call_object(call)}
                return self._chunk({"tool_calls": [numbered]})
            case Finished():
                refusal = {} if event.refusal is None else {"refusal": event.refusal}
                last = self._chunk(refusal, self._reason(event))
                if event.stop_text is not None:
                    last["choices"][0]["stop_reason"] = event.stop_text  # vLLM's name for it
                return {**last, "timings": asdict(event.timings)}

    def usage_chunk(self, finished: Finished) -> dict[str, Any]:
        """The chunk after the last one, which `stream_options.include_usage` asks for."""
        return {
            **self._head("chat.completion.chunk"),
            "choices": [],
            "usage": usage_object(finished.usage),
            "timings": asdict(finished.timings),
        }

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": self._take_logprobs(),
            "finish_reason": reason,
        }
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _reason(self, finished: Finished) -> str:
        """OpenAI's word for how the reply ended.

        It has none for one that was stopped from outside, and clients that read `tool_calls` look
        for calls, which there are none of if no call could be read.
        """
        has_none = finished.reason == "tool_calls" and not self.tool_calls
        return "stop" if has_none or finished.reason == "cancelled" else finished.reason

    def _take_logprobs(self) -> dict[str, Any] | None:
        entries, self.logprobs = self.logprobs, []
        return {"content": entries, "refusal": None} if entries else None

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}
