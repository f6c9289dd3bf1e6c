"""What a reply cost and how fast it came, from the many ways in which endpoints say so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

from nanorun.model.chat import Event, PrefillProgress, Timings, TokenLogprobs, Usage

CachedFrom = Literal["device", "host", "disk"]


def settle_usage(theirs: Mapping[str, Any] | None, n_thinking: int, n_text: int) -> Usage:
    """The tokens of a reply.

    Args:
        theirs: The endpoint's usage; None if it gave none, so that pieces have to do.
        n_thinking: Pieces of thinking that came.
        n_text: Pieces of everything else.
    """
    n_pieces = n_thinking + n_text
    if theirs is None:
        return Usage(thinking_tokens=n_thinking, completion_tokens=n_pieces)
    n_completion = _count_in(theirs, "completion_tokens")
    details = theirs.get("completion_tokens_details")
    if isinstance(details, Mapping) and details.get("reasoning_tokens") is not None:
        n_thinking = _count_in(details, "reasoning_tokens")
    else:
        n_thinking = round(n_completion * n_thinking / n_pieces) if n_pieces else 0
    cached = theirs.get("prompt_tokens_details")
    return Usage(
        prompt_tokens=_count_in(theirs, "prompt_tokens"),
        cached_tokens=_count_in(cached, "cached_tokens"),
        cached_from=_cached_from(cached),
        thinking_tokens=min(n_thinking, n_completion),
        completion_tokens=n_completion,
    )


def settle_timings(theirs: Mapping[str, Any], seen: Timings, n_tokens: int) -> Timings:
    """The endpoint's own times, or those seen from here.

    Args:
        theirs: The endpoint's, in nanorun's or llama.cpp's words; empty if it gave none.
        seen: Seconds to the first piece and from there to the last.
        n_tokens: Tokens that came.
    """
    if "decode_s" in theirs:
        return Timings(**{name: _number(theirs.get(name)) for name in Timings.__slots__})
    if "predicted_ms" in theirs:
        return Timings(
            prefill_s=_number(theirs.get("prompt_ms")) / 1000,
            decode_s=_number(theirs.get("predicted_ms")) / 1000,
            prefill_tps=_number(theirs.get("prompt_per_second")),
            decode_tps=_number(theirs.get("predicted_per_second")),
        )
    n_after_first = max(n_tokens - 1, 0)
    tps = n_after_first / seen.decode_s if seen.decode_s > 0 else 0.0
    return replace(seen, decode_tps=tps)


def logprob_events(logprobs: Any, *, in_thinking: bool) -> list[Event]:
    """How likely the tokens of a chunk were, in OpenAI's form."""
    content = logprobs.get("content") if isinstance(logprobs, Mapping) else None
    entries = [e for e in content if isinstance(e, Mapping)] if isinstance(content, list) else []
    events: list[Event] = []
    for entry in entries:
        top = entry.get("top_logprobs")
        others = [e for e in top if isinstance(e, Mapping)] if isinstance(top, list) else []
        alternatives = tuple((_piece(e), _number(e.get("logprob"))) for e in others)
        logprob = _number(entry.get("logprob"))
        events.append(TokenLogprobs(_piece(entry), logprob, alternatives, in_thinking))
    return events


def _piece(entry: Mapping[str, Any]) -> bytes:
    """A token's bytes: as a list of numbers where it may be no whole character."""
    numbers = entry.get("bytes")
    if isinstance(numbers, list) and all(isinstance(n, int) and 0 <= n < 256 for n in numbers):
        return bytes(numbers)
    return str(entry.get("token", "")).encode("utf-8", "replace")


def progress_events(progress: Any) -> list[Event]:
    """llama.cpp's account of how far the prompt is read."""
    if not isinstance(progress, Mapping):
        return []
    counts = (_count_in(progress, name) for name in ("processed", "total", "cache"))
    return [PrefillProgress(*counts)]


def sum_usage(before: Usage | None, usage: Usage) -> Usage:
    """The usage of two calls that made one reply: the second read the first's thinking."""
    if before is None:
        return usage
    return Usage(
        prompt_tokens=max(usage.prompt_tokens - before.completion_tokens, 0),
        cached_tokens=usage.cached_tokens,
        thinking_tokens=before.thinking_tokens + usage.thinking_tokens,
        completion_tokens=before.completion_tokens + usage.completion_tokens,
    )


def _cached_from(details: Any) -> CachedFrom | None:
    """Where nanorun says that cached tokens were."""
    place = details.get("cached_from") if isinstance(details, Mapping) else None
    return place if place in get_args(CachedFrom) else None


def _count_in(fields: Any, name: str) -> int:
    value = fields.get(name) if isinstance(fields, Mapping) else None
    return value if isinstance(value, int) and value > 0 else 0


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
