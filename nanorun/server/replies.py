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
from nanorun.model.reply_so_far import ReplySoFar


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


def _token_object(token: TokenLogprobs) -> dict[str, Any]:
    best = [_logprob_object(piece, logprob) for piece, logprob in token.alternatives]
    return {**_logprob_object(token.piece, token.logprob), "top_logprobs": best}


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
    so_far: ReplySoFar = field(default_factory=ReplySoFar)
    _n_logprobs_given: int = 0

    def take(self, event: Event) -> None:
        """Add an event; a call that could not be read is text, as no client could make it."""
        if isinstance(event, ToolCallDelta) and not event.call.name:
            event = TextDelta(event.problem or "")
        self.so_far.take(event)

    def completion(self) -> dict[str, Any]:
        """The whole completion, once it has finished."""
        so_far, finished = self.so_far, self.so_far.finished
        assert finished is not None
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if so_far.calls and not so_far.answer else so_far.answer,
        }
        if finished.refusal is not None:
            message["refusal"] = finished.refusal
        if so_far.thinking:
            message |= _reasoning(so_far.thinking)
        if so_far.tool_calls:
            message["tool_calls"] = [_call_object(call) for call in so_far.tool_calls]
        choice = {
            "index": 0,
            "message": message,
            "logprobs": self._take_logprobs(),
            "finish_reason": self._reason(finished),
        }
        return {
            **self._head("chat.completion"),
            "choices": [choice],
            "usage": usage_object(finished.usage),
            "timings": asdict(finished.timings),
        }

    def opening(self) -> dict[str, Any]:
        """The chunk that says who speaks."""
        return self._chunk({"role": "assistant", "content": ""})

    def chunk(self, event: ThinkingDelta | TextDelta | ToolCallDelta | Finished) -> dict[str, Any]:
        """The chunk of an event that was just taken."""
        match event:
            case ThinkingDelta(text):
                return self._chunk(_reasoning(text))
            case TextDelta(text):
                return self._chunk({"content": text})
            case ToolCallDelta(call=call, problem=problem) if not call.name:
                return self._chunk({"content": problem or ""})
            case ToolCallDelta(call=call):
                numbered = {"index": len(self.so_far.calls) - 1, **_call_object(call)}
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
        has_none = finished.reason == "tool_calls" and not self.so_far.calls
        return "stop" if has_none or finished.reason == "cancelled" else finished.reason

    def _take_logprobs(self) -> dict[str, Any] | None:
        """Those of the answer's tokens that were not given yet."""
        fresh = self.so_far.logprobs[self._n_logprobs_given :]
        self._n_logprobs_given += len(fresh)
        entries = [_token_object(token) for token in fresh if not token.in_thinking]
        return {"content": entries, "refusal": None} if entries else None

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}
