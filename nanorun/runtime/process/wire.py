"""How the engine's process and its client talk: length-prefixed JSON frames.

A frame is a 4-byte big-endian length and that many bytes of UTF-8 JSON. Requests carry `verb` and
`id`; answers carry `id` and `kind`, the name of an event class, `ready`, `result` or `error`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any, BinaryIO

from nanorun import errors
from nanorun.errors import EngineError, NanorunError
from nanorun.model.chat import (
    Event,
    Finished,
    GenerateOptions,
    Grammar,
    Message,
    Notice,
    PrefillProgress,
    TextDelta,
    ThinkingDelta,
    Timings,
    TokenLogprobs,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from nanorun.model.think import Think

HEADER_BYTES = 4
MAX_FRAME_BYTES = 256 * 2**20

_EVENTS: dict[str, type] = {
    cls.__name__: cls
    for cls in (PrefillProgress, ThinkingDelta, TextDelta, ToolCallDelta, Notice, Finished)
}


def pack(payload: dict[str, Any]) -> bytes:
    """A frame of a JSON object.

    Raises:
        EngineError: If it is larger than the other side takes.
    """
    body = json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    if len(body) > MAX_FRAME_BYTES:
        raise EngineError(
            f"a message of {len(body)} bytes to or from the engine's process is too large",
            facts=[f"at most {MAX_FRAME_BYTES} bytes are taken"],
        )
    return len(body).to_bytes(HEADER_BYTES, "big") + body


def frame_bytes(header: bytes) -> int:
    """Bytes that follow a header.

    Raises:
        EngineError: If the length is absurd, so the stream is not ours.
    """
    n = int.from_bytes(header, "big")
    if n > MAX_FRAME_BYTES:
        raise EngineError(f"a frame of {n} bytes from the engine's process is not plausible")
    return n


def read(stream: BinaryIO) -> dict[str, Any] | None:
    """The next frame; None at the end of the stream, also of one that ends within a frame."""
    header = stream.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        return None
    n_bytes = frame_bytes(header)
    body = stream.read(n_bytes)
    return unpack(body) if len(body) == n_bytes else None


def unpack(body: bytes) -> dict[str, Any]:
    """The JSON object of a frame's body."""
    payload: dict[str, Any] = json.loads(body)
    return payload


def event_to_json(event: Event) -> dict[str, Any]:
    """An event as a JSON object."""
    if isinstance(event, TextDelta | ThinkingDelta):  # one a token; asdict copies deeply
        return {"kind": type(event).__name__, "text": event.text}
    if isinstance(event, TokenLogprobs):
        return _logprobs_to_json(event)
    return {"kind": type(event).__name__, **asdict(event)}


def event_from_json(payload: dict[str, Any]) -> Event:
    """The event of a JSON object made by `event_to_json`."""
    if payload["kind"] == "TokenLogprobs":
        return _logprobs_from_json(payload)
    fields = {key: value for key, value in payload.items() if key not in ("kind", "id")}
    if payload["kind"] == "Finished":
        fields["usage"] = Usage(**fields["usage"])
        fields["timings"] = Timings(**fields["timings"])
    elif payload["kind"] == "ToolCallDelta":
        fields["call"] = ToolCall(**fields["call"])
    event: Event = _EVENTS[payload["kind"]](**fields)
    return event


def _logprobs_to_json(event: TokenLogprobs) -> dict[str, Any]:
    """A piece may be part of a character; as Latin-1 every byte is one."""
    return {
        "kind": "TokenLogprobs",
        "piece": event.piece.decode("latin-1"),
        "logprob": event.logprob,
        "alternatives": [[piece.decode("latin-1"), p] for piece, p in event.alternatives],
        "in_thinking": event.in_thinking,
    }


def _logprobs_from_json(payload: dict[str, Any]) -> TokenLogprobs:
    return TokenLogprobs(
        payload["piece"].encode("latin-1"),
        payload["logprob"],
        tuple((piece.encode("latin-1"), p) for piece, p in payload["alternatives"]),
        payload["in_thinking"],
    )


def message_from_json(payload: dict[str, Any]) -> Message:
    """The message of `asdict(message)`."""
    calls = tuple(ToolCall(**call) for call in payload["tool_calls"])
    return Message(**{**payload, "tool_calls": calls})


def options_from_json(payload: dict[str, Any]) -> GenerateOptions:
    """The options of `asdict(options)`."""
    return GenerateOptions(
        **{
            **payload,
            "think": Think(**payload["think"]),
            "logit_bias": tuple((int(token), float(bias)) for token, bias in payload["logit_bias"]),
            "stop": tuple(payload["stop"]),
            "tools": tuple(payload["tools"]),
            "grammar": Grammar(**payload["grammar"]) if payload["grammar"] else None,
        }
    )


def error_to_json(error: NanorunError) -> dict[str, Any]:
    """An expected error as a JSON object."""
    return {
        "kind": "error",
        "error": type(error).__name__,
        "message": error.message,
        "facts": list(error.facts),
        "tries": list(error.tries),
    }


def error_from_json(payload: dict[str, Any]) -> NanorunError:
    """The error of `error_to_json`; an unknown class becomes an `EngineError`."""
    kind = getattr(errors, payload["error"], EngineError)
    error: NanorunError = kind(payload["message"], facts=payload["facts"], tries=payload["tries"])
    return error
