"""A reply's events as OpenAI's older objects: one `text_completion`, or chunks of it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Iterator
from typing import Any

from nanorun.model.chat import Event, Finished, RawPrompt, TextDelta, ThinkingDelta, TokenLogprobs
from nanorun.server import sse
from nanorun.server.asked import Asked
from nanorun.server.errors import ApiError
from nanorun.server.openai.usage import summed_usage, usage_object
from nanorun.server.writer import SseWriter


class CompletionWriter(SseWriter):
    """One completion in the making.

    Args:
        model: The model's name towards clients.
        asked: The prompts.
        echo: Whether each text begins with its prompt.
        include_usage: Whether a stream ends with the usage.
    """

    def __init__(self, model: str, asked: Asked, *, echo: bool, include_usage: bool) -> None:
        super().__init__(asked.n_answers, asked.notices)
        self.id = f"cmpl-{secrets.token_hex(12)}"
        self._model = model
        self._created = int(time.time())
        self._asked = asked
        self._echoes = [_text(prompt) if echo else "" for prompt, _ in asked.answers()]
        self._include_usage = include_usage
        self._offsets = [len(text) for text in self._echoes]
        self._n_logprobs_given = [0] * asked.n_answers

    def whole(self) -> dict[str, Any]:
        """The whole completion, once it has finished."""
        choices = [
            self._choice(i, self._echoes[i] + reply.answer, reply.thinking, self._reason(i))
            for i, reply in enumerate(self.replies)
        ]
        made = {**self._head(), "choices": choices, "usage": self._usage()}
        return {**made, "notices": self.notices} if self.notices else made

    def opening(self) -> Iterator[bytes]:
        """The prompts that are to be echoed."""
        for i, text in enumerate(self._echoes):
            if text:
                yield self._chunk(i, text)

    def write_event(self, i_choice: int, event: Event) -> Iterable[bytes]:
        """The chunk of an event that was just taken."""
        match event:
            case TextDelta(text):
                return [self._chunk(i_choice, text)]
            case ThinkingDelta(text):
                return [self._chunk(i_choice, "", text)]
            case Finished():
                return [self._chunk(i_choice, "", reason=self._reason(i_choice))]
        return []

    def closing(self) -> Iterator[bytes]:
        """The usage, if `stream_options.include_usage` asks for it, and the end."""
        if self._include_usage:
            yield sse.encode({**self._head(), "choices": [], "usage": self._usage()})
        yield sse.DONE

    def failure(self, error: ApiError) -> Iterable[bytes]:
        """The error's body as the last event; no `[DONE]` follows."""
        return [sse.encode(error.body())]

    def _chunk(self, i: int, text: str, thinking: str = "", reason: str | None = None) -> bytes:
        return sse.encode({**self._head(), "choices": [self._choice(i, text, thinking, reason)]})

    def _choice(self, i: int, text: str, thinking: str, reason: str | None) -> dict[str, Any]:
        choice = {
            "index": i,
            "text": text,
            "logprobs": self._take_logprobs(i),
            "finish_reason": reason,
        }
        return {**choice, "reasoning": thinking} if thinking else choice

    def _reason(self, i: int) -> str:
        reason = self.finished(i).reason
        return "length" if reason == "length" else "stop"

    def _take_logprobs(self, i: int) -> dict[str, Any] | None:
        """Those of the text's tokens that were not given yet, in lists side by side."""
        if self._asked.options.logprobs is None:
            return None
        fresh = self.replies[i].logprobs[self._n_logprobs_given[i] :]
        self._n_logprobs_given[i] += len(fresh)
        tokens = [token for token in fresh if not token.in_thinking]
        return {
            "tokens": [_piece(token.piece) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [_alternatives(token) for token in tokens],
            "text_offset": [self._offset(i, token) for token in tokens],
        }

    def _offset(self, i: int, token: TokenLogprobs) -> int:
        at = self._offsets[i]
        self._offsets[i] += len(_piece(token.piece))
        return at

    def _usage(self) -> dict[str, Any]:
        usages = [self.finished(i).usage for i in range(len(self.replies))]
        return usage_object(summed_usage(usages, n_each=self._asked.n))

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
        }


def _text(prompt: Any) -> str:
    assert isinstance(prompt, RawPrompt)
    return prompt.text or ""


def _piece(piece: bytes) -> str:
    return piece.decode("utf-8", "replace")


def _alternatives(token: TokenLogprobs) -> dict[str, float]:
    return {_piece(piece): logprob for piece, logprob in token.alternatives} or {
        _piece(token.piece): token.logprob
    }
