"""A reply as OpenAI's `response`, whole or as the events that build it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

from nanorun.model.chat import Event, Usage
from nanorun.server import sse
from nanorun.server.asked import Asked
from nanorun.server.errors import ApiError
from nanorun.server.openai.responses.body import ResponsesRequest
from nanorun.server.openai.responses.offered import OfferedTools
from nanorun.server.openai.responses.output_items import OutputItems, new_id
from nanorun.server.writer import SseWriter

Save = Callable[[dict[str, Any]], Awaitable[bool]]

_ERROR_CODES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}


class ResponsesWriter(SseWriter):
    """One response in the making.

    Args:
        model: The model's name towards clients.
        asked: The question.
        request: As it came.
        tools: What it offers.
        save: Keeps the response once it has finished, and says whether it could; None if the
            client wants it forgotten.
    """

    def __init__(
        self,
        model: str,
        asked: Asked,
        request: ResponsesRequest,
        tools: OfferedTools,
        save: Save | None = None,
    ) -> None:
        super().__init__(1, asked.notices)
        self.id = new_id("resp")
        self.error: ApiError | None = None
        """Why it failed, if it did."""
        self.is_settled = False
        """Whether it has come to its end, and is kept if it can be."""
        self._created = int(time.time())
        self._fields = {"model": model, **request.echoed()}
        self._items = OutputItems(
            tools, summarizes=request.summarizes, seals=request.seals_reasoning
        )
        self._save = save
        self._n_events = 0
        self._news: list[tuple[str, dict[str, Any]]] = []
        """What the last event changed."""

    def take(self, i_choice: int, event: Event) -> Event:
        """Add an event."""
        event = super().take(i_choice, event)
        self._news = list(self._items.take(event))
        if self._items.broken_call is not None and self.replies[0].finished is event:
            self.notices.append(f"a call of {self._items.broken_call} broke off and was left out")
        return event

    def opening(self) -> Iterator[bytes]:
        """The response before anything is said, after comments on how it was taken."""
        for notice in self.notices:
            yield sse.comment(f"notice: {notice}")
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self.now())

    def write_event(self, i_choice: int, event: Event) -> Iterable[bytes]:
        """What an event that was just taken changes."""
        return [self._event(kind, **fields) for kind, fields in self._news]

    async def settle(self) -> None:
        """Keep the response before its end is told: the next request may come at once."""
        if self._save is not None and not await self._save(self.now()):
            self._fields["store"] = False
            self.notices.append("the response could not be kept; the server's log says why")
        self.is_settled = True

    def closing(self) -> Iterator[bytes]:
        """The whole response."""
        response = self.now()
        told = "completed" if response["status"] == "completed" else "incomplete"
        yield self._event(f"response.{told}", response=response)

    def failure(self, error: ApiError) -> Iterable[bytes]:
        """The response as far as it came, and why it failed."""
        self.error = error
        return [self._event("response.failed", response=self.now())]

    def whole(self) -> dict[str, Any]:
        """The response, once it has finished."""
        return self.now()

    def now(self) -> dict[str, Any]:
        """The response as it stands."""
        finished = self.replies[0].finished
        status = self._status()
        made = {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": _error_object(self.error),
            "incomplete_details": (
                {"reason": "max_output_tokens"} if status == "incomplete" else None
            ),
            "output": list(self._items.whole),
            "usage": usage_object(finished.usage) if finished else None,
            **self._fields,
        }
        return {**made, "notices": self.notices} if self.notices else made

    def _status(self) -> str:
        finished = self.replies[0].finished
        if self.error is not None:
            return "failed"
        if finished is None:
            return "in_progress"
        return {"length": "incomplete", "cancelled": "cancelled"}.get(finished.reason, "completed")

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = {"type": kind, "sequence_number": self._n_events, **fields}
        self._n_events += 1
        return sse.encode(event, kind)


def usage_object(usage: Usage) -> dict[str, Any]:
    """What a response cost."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.thinking_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _error_object(error: ApiError | None) -> dict[str, Any] | None:
    if error is None:
        return None
    return {"code": _ERROR_CODES.get(error.status, "server_error"), "message": error.message}
